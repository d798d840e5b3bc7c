"""Train a stage.   `python scripts/train.py --config configs/train/shapes_image.yaml`   Repeat it to go on.

Several configs, each after its own `--config`, are trained one after the other.
`torchrun --nproc_per_node N scripts/train.py …` shares the micro-batches of a step out among N processes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from animatediff.lab.stage_help import explain_stage, stages_list
from animatediff.lab.stage_table import load_train_config
from animatediff.pipeline.device import own_device
from animatediff.pipeline.processes import launched
from animatediff.training.stages import Training
from animatediff.utils import Parser, UserError, run_main

GONE = re.compile("closed by peer|reset by peer|Connection (refused|closed)|Broken pipe|failed to recv", re.IGNORECASE)


class Help(argparse.Action):
    """`--help` alone lists the stages; `--help STAGE` the keys of one."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        print(explain_stage(values) if values else f"{parser.format_help()}\nstages:\n{stages_list()}")
        parser.exit()


def main(argv: list[str] | None = None) -> None:
    processes = launched()
    with processes.one_error():
        run(argv, partial(processes.tell_once, file=sys.stdout))


def run(argv: list[str] | None, log: Callable[[str], None]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("-h", "--help", action=Help, nargs="?", metavar="STAGE", help="this, or the keys of a stage")
    parser.add_argument("--config", action="append", required=True, help="a YAML of configs/train; may be repeated")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: CUDA where it is")
    parser.add_argument("--check-data", action="store_true", help="look at every file, report, and do nothing else")
    parser.add_argument("--cache", action="store_true", help="encode every clip once, before the start (cache: true)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change values of the YAML: seed=1, loop.steps=10"
    )
    args = parser.parse_args(argv)
    configs = [load_train_config(path, args.overrides) for path in args.config]
    for flag, given in (("--check-data", args.check_data), ("--cache", args.cache)):
        for path, config in zip(args.config, configs, strict=True):
            if given and not isinstance(config, Training):
                raise UserError(f"got {flag} for {path}, which draws its own clips, expected a stage of files")
    if args.check_data:
        for config in configs:
            config.check_data(log)
        return
    if args.cache:
        configs = [replace(config, cache=True) for config in configs]
    torch.set_flush_denormal(True)  # denormal numbers make CPU training many times slower
    device = own_device(args.device)
    if "WORLD_SIZE" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # the first may encode all clips meanwhile
    for config in configs:
        config.run(log, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        run_main(main)
    except BaseException as end:
        if not dist.is_initialized():
            raise
        # An error of this process: the others wait for it, and the group's own end might wait for them.
        if isinstance(end, RuntimeError) and GONE.search(str(end)):
            print("this process ends, too: another one has ended, which says why", file=sys.stderr)
        elif not isinstance(end, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end, SystemExit) else 1)
