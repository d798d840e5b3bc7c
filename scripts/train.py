"""Train a stage.   `python scripts/train.py --config configs/train/shapes_image.yaml`   Repeat it to go on.

`torchrun --nproc_per_node N scripts/train.py …` shares the micro-batches of a step out among N processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not scripts/: scripts/inspect.py must not shadow the standard module
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os

import torch
import torch.distributed as dist

from animatediff.training.stages import load_train_config
from animatediff.utils import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML of configs/train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change top-level values of the YAML")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # denormal numbers make CPU training many times slower
    config = load_train_config(args.config, args.overrides)
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    config.run(lambda line: print(line, flush=True))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
