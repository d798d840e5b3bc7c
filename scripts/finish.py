"""A clip larger and smoother.   `python scripts/finish.py CLIP finish.scale=2 finish.interpolate=2`

`finish.strength=0.4` adds a second pass by the model and prompt that the clip's own settings name (hires fix).
docs/finishing.md says what each option does; `--help finish` lists them.
"""

from __future__ import annotations

import argparse
import sys

from animatediff.config.help import explain_options
from animatediff.config.spellings import parse_assignments
from animatediff.utils import Parser, UserError, printable, run_main


class Help(argparse.Action):
    """`--help` alone, or about one option or group."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        print(explain_options(values) if values else f"{parser.format_help()}\n{explain_options('finish')}")
        parser.exit()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-h", "--help", action=Help, nargs="?", metavar="KEY", help="this, or what one key means")
    parser.add_argument("clip", help="a file or a folder of frames, made by us or not")
    parser.add_argument("--audio", action="store_true", help="the clip's own sound goes along, copied as it is (mp4)")
    parser.add_argument("--output", help="by default beside the clip, -finished behind its name")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default float16 on CUDA, else float32")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of finish; output.format")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    overrides = parse_assignments(args.overrides, of="finish")
    if args.audio:
        if "finish.audio" in overrides:
            raise UserError("got both --audio and finish.audio, expected one of them")
        overrides["finish.audio"] = args.clip
    from animatediff.pipeline.finish_clip import finish_clip  # here: it imports torch

    target, outcome = finish_clip(args.clip, overrides, output=args.output, device=args.device, dtype=args.dtype)
    print(printable(outcome), file=sys.stderr)
    print(printable(str(target)))


if __name__ == "__main__":
    run_main(main)
