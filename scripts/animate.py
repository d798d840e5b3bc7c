"""Prompts to animations.   `python scripts/animate.py --prompt "a red circle moving left on a black background"`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from animatediff.config.dataclass_io import parse_overrides
from animatediff.config.prompt_yaml import AnimateEntry, config_of, load_config
from animatediff.utils import Parser, UserError, run_main

BUNDLED = Path(__file__).resolve().parents[1] / "configs" / "animate" / "shapes.yaml"
FLAGS = (  # command-line spelling, key of a config's entry, type, help
    ("--prompt", "prompt", str, "what to animate; may be given several times"),
    ("--n-prompt", "n_prompt", str, "what to avoid"),
    ("--seed", "seed", int, "0 to 2^64 - 1; -1 draws one and records it"),
    ("--L", "L", int, "frames"),
    ("--W", "W", int, "width in pixels"),
    ("--H", "H", int, "height in pixels"),
    ("--pretrained-model-path", "pretrained_model_path", str, "base model: diffusers folder or single file"),
    ("--inference-config", "inference_config", str, "YAML that describes motion module and noise schedule"),
    ("--format", "format", str, "gif, mp4, webp, or png (a folder of lossless frames)"),
    ("--fps", "fps", float, "frames per second"),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. What it sets goes before what the config says, for every entry of the config."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="prompt config (YAML); without it the bundled model, or the base given")
    for flag, key, kind, text in FLAGS:
        action = "append" if key in ("prompt", "n_prompt", "seed") else "store"
        parser.add_argument(flag, dest=key, type=kind, action=action, help=text)
    parser.add_argument("--output-dir", help="by default samples/<config>-<time>; of an unfinished run: goes on there")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default float16 on CUDA, else float32")
    parser.add_argument("--without-xformers", action="store_true", help="no effect: xformers is never used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of an entry, e.g. steps=10")
    return parser.parse_intermixed_args(argv)


def collect_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Raw values for keys of every entry.

    Raises:
        UserError: a key is given both as an option and as key=value.
    """
    flags = {key: getattr(args, key) for _, key, *_ in FLAGS if getattr(args, key) is not None}
    pairs = parse_overrides(AnimateEntry, args.overrides)
    if both := flags.keys() & pairs.keys():
        raise UserError(f"got {min(both)} both as an option and as key=value, expected it once")
    return flags | pairs


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.config is None and args.prompt is None and not any(a.startswith("prompt=") for a in args.overrides):
        raise UserError('got nothing to animate, expected --prompt "…" or --config FILE (--help lists all options)')
    overrides = collect_overrides(args)
    if args.config is None and "pretrained_model_path" in overrides:  # nothing of the bundled model fits another one
        config = config_of(overrides, name="sample")
    else:
        config = load_config(args.config or BUNDLED, overrides)
    if args.without_xformers:
        print("--without-xformers has no effect: xformers is never used here", file=sys.stderr)
    from animatediff.pipeline.run import animate  # here, because it imports torch: mistakes above are told at once

    animate(config, output_dir=args.output_dir, device=args.device, dtype=args.dtype)


if __name__ == "__main__":
    run_main(main)
