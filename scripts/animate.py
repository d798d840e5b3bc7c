"""Prompts to animations.   `python scripts/animate.py --prompt "a red circle moving left on a black background"`

`torchrun --nproc_per_node N scripts/animate.py …` shares the prompts out among N processes;
with `--split-clips` all of them make one clip at a time.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from animatediff.config.help import explain_options
from animatediff.config.prompt_yaml import BUNDLED, RunConfig, config_from, config_of, load_config
from animatediff.config.settings import parse_value, read_yaml
from animatediff.config.spellings import all_options, flat_names, nest, parse_assignments
from animatediff.pipeline.processes import OneProcess, launched
from animatediff.utils import Parser, UserError, give_back_freed_memory, run_main

YAMLS = (".yaml", ".yml")
# Options of the official script and the most used ones; every option has `key=value`.
FLAGS = {
    "--prompt": "prompt",
    "--n-prompt": "n_prompt",
    "--seed": "seed",
    "--steps": "steps",
    "--guidance-scale": "guidance_scale",
    "--L": "L",
    "--W": "W",
    "--H": "H",
    "--pretrained-model-path": "pretrained_model_path",
    "--inference-config": "inference_config",
    "--format": "format",
    "--fps": "fps",
    "--max-memory": "max_memory",
}


class Help(argparse.Action):
    """`--help` alone lists everything; `--help KEY` or `--help GROUP` explains one option or group."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        print(explain_options(values) if values else f"{parser.format_help()}\n{explain_options()}")
        parser.exit()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. What it sets goes before what the config says, for every entry of the config."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action=Help, nargs="?", metavar="KEY", help="this, or what one key means")
    parser.add_argument(
        "--config",
        help="prompt config (YAML), or a clip or picture made by us, AUTOMATIC1111 or ComfyUI; without it the bundled "
        "model, or the base given",
    )
    for flag, key in FLAGS.items():
        action = "append" if key in ("prompt", "n_prompt", "seed") else "store"
        parser.add_argument(flag, dest=key, action=action, help=flat_names()[key].help.replace("%", "%%"))
    parser.add_argument("--output-dir", help="by default samples/<config>-<time>; of an unfinished run: goes on there")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default float16 on CUDA, else float32")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="the UNet by torch.compile: minutes at first, for many clips on a GPU; equal but for rounding",
    )
    parser.add_argument("--plan", action="store_true", help="say how much memory and time it will take, and stop")
    parser.add_argument(
        "--split-clips",
        action="store_true",
        help="of torchrun: share out every clip's windows, or the parts of its guidance, instead of the prompts",
    )
    parser.add_argument("--without-xformers", action="store_true", help="no effect: xformers is never used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any option, flat or grouped")
    return parser.parse_intermixed_args(argv)


def collect_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Raw values for options of every entry.

    Raises:
        UserError: an option is given both as a flag and as key=value.
    """
    flags = {key: _value(flag, key, text) for flag, key in FLAGS.items() if (text := getattr(args, key)) is not None}
    pairs = parse_assignments(args.overrides)
    canonical = {key: (all_options().get(key) or flat_names().get(key)) for key in (*flags, *pairs)}
    for key in flags:
        if any(canonical[pair] is not None and canonical[pair] is canonical[key] for pair in pairs):
            raise UserError(f"got {key} both as an option and as key=value, expected it once")
    return flags | pairs


def _value(flag: str, key: str, text: str | list[str]) -> Any:
    """What is written after a flag: words as they are, numbers as `key=value` has them."""
    if flat_names()[key].takes_text:
        return text
    return (
        [_value(flag, key, t) for t in text] if isinstance(text, list) else parse_value(text, is_text=False, where=flag)
    )


def read_config(args: argparse.Namespace, overrides: dict[str, Any], tell: Callable[[str], None]) -> RunConfig:
    """The config of the command line: a YAML, what a clip's file says, or what the command line says alone.

    Args:
        tell: is told what the user should know of it.
    """
    if args.config is not None and not args.config.strip():
        raise UserError("got --config '', expected a file")
    if args.config is None and {"pretrained_model_path", "model.base"} & set(overrides):
        return config_of(overrides, name="sample")  # nothing of the bundled model fits another one
    if args.config is None:
        return config_from(read_yaml(BUNDLED), "the bundled model", name=BUNDLED.stem, overrides=overrides)
    path = Path(args.config)
    if path.suffix.lower() in YAMLS:
        config = load_config(path, overrides)
        if not config.provenance:
            return config
    from animatediff.pipeline.remembered import load_run  # here, because it imports torch

    config, notes = load_run(path, overrides)
    for line in notes:
        tell(line)
    return config


def main(argv: list[str] | None = None) -> None:
    processes = launched()
    with processes.one_error():
        run(argv, processes)


def run(argv: list[str] | None, processes: OneProcess) -> None:
    args = parse(argv)
    overrides = collect_overrides(args)
    _, spelled = nest(overrides)
    if args.config is None and "prompts.prompt" not in spelled:
        raise UserError('got nothing to animate, expected --prompt "…" or --config FILE (--help lists all options)')
    config = read_config(args, overrides, processes.tell_once)
    if args.without_xformers:
        processes.tell_once("--without-xformers has no effect: xformers is never used here")
    if any(entry.memory.max for entry in config.entries):
        give_back_freed_memory()
    if args.plan:
        from animatediff.pipeline.plan_report import plan_lines

        if processes.first:
            print("\n".join(plan_lines(config, device=args.device, dtype=args.dtype)))
        return
    from animatediff.pipeline.run import animate  # here, because it imports torch: mistakes above are told at once

    if not gc.get_freeze_count():
        gc.freeze()  # modules are no garbage: looking through torch's takes a third of a second at the end
    if args.split_clips:
        processes = processes.splitting()
    animate(
        config,
        output_dir=args.output_dir,
        device=args.device,
        dtype=args.dtype,
        compiled=args.compile,
        processes=processes,
    )


if __name__ == "__main__":
    run_main(main)
