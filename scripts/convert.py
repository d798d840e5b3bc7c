"""Weights in another format: `python scripts/convert.py IN OUT --to ldm|diffusers|official-motion|kohya|…`."""

from __future__ import annotations

import argparse
from pathlib import Path

from animatediff.checkpoints.controlnet_files import read_controlnet_parts, write_controlnet
from animatediff.checkpoints.export import write_diffusers, write_ldm, write_motion_adapter, write_official_motion
from animatediff.checkpoints.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from animatediff.checkpoints.lora_files import in_dialect, read_lora, write_lora
from animatediff.checkpoints.parts import read_image_parts, read_motion_parts
from animatediff.config.networks import MOTION_VERSIONS
from animatediff.utils import Parser, UserError, run_main

FILE_FORMATS = ("ldm", "official-motion", "kohya", "diffusers-lora", "controlnet")
DIALECTS = {"kohya": "kohya", "diffusers-lora": "diffusers"}
FORMATS = {
    "ldm": "an SD 1.x single file",
    "diffusers": "a diffusers folder",
    "official-motion": "a motion module in official keys",
    "diffusers-motion": "a MotionAdapter folder",
    "kohya": "a LoRA in kohya's keys",
    "diffusers-lora": "a LoRA in diffusers' (PEFT) keys",
    "controlnet": "a ControlNet in the original keys",
    "diffusers-controlnet": "a ControlNet as a diffusers folder",
}


def main() -> None:
    args = parse_arguments()
    check_output(args.input, args.output, to=args.to, overwrite=args.overwrite)
    if args.version and not args.to.endswith("motion"):
        raise UserError(
            f"got --version {args.version} with --to {args.to}, expected it for motion modules only: drop it"
        )
    notes, unused = [], []
    if args.to in DIALECTS:
        lora = read_lora(args.input)
        write_lora(in_dialect(lora, DIALECTS[args.to]), args.output)
        unused = [*lora.unread, *(f"bundle_emb.{word}" for word in lora.embeddings)]
    elif args.to.endswith("controlnet"):
        net = read_controlnet_parts(args.input)
        write_controlnet(net, args.output)
        notes, unused = net.notes, net.unused
    elif args.to.endswith("motion"):
        parts = read_motion_parts(args.input)
        write = write_official_motion if args.to == "official-motion" else write_motion_adapter
        write(parts, args.output, version=args.version)
        notes, unused = parts.notes, parts.unused
    else:
        parts = read_image_parts(args.input)
        write = write_ldm if args.to == "ldm" else write_diffusers
        write(parts, args.output)
        notes, unused = parts.notes, parts.unused
    print(f"wrote {args.output}, {FORMATS[args.to]}, from {args.input}")
    for note in notes:
        print(f"  note: {note}")
    if unused:
        print(f"  left out {len(unused)} entries: {', '.join(unused[:5])}{' …' * (len(unused) > 5)}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Convert weights between file formats.")
    parser.add_argument("input", type=Path, metavar="IN", help="file or folder of any format")
    parser.add_argument("output", type=Path, metavar="OUT", help="file (.safetensors, .ckpt) or folder to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="; ".join(f"{k}: {v}" for k, v in FORMATS.items()))
    parser.add_argument("--version", choices=MOTION_VERSIONS, help="of a motion module whose file does not tell")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser.parse_args()


def check_output(source: Path, target: Path, *, to: str, overwrite: bool) -> None:
    """Refuse before anything is read.

    Raises:
        UserError: OUT is IN, exists, or has the name of a file where a folder is written (or the other way round).
    """
    weights = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"got {source} as IN and {target} as OUT, expected two places: choose another OUT")
    if target.exists() and not overwrite:
        raise UserError(f"got {target} as OUT, which exists: choose another name, or add --overwrite")
    if to in FILE_FORMATS and (target.suffix not in weights or target.is_dir()):
        raise UserError(f"got {target} as OUT, expected a file name ending in {', '.join(weights)}: rename it")
    if to not in FILE_FORMATS and target.suffix in weights:
        raise UserError(f"got {target} as OUT, expected the name of a folder, which {FORMATS[to]} is: rename it")


if __name__ == "__main__":
    run_main(main)
