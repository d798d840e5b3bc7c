"""Weights in another format: `python scripts/convert.py IN OUT --to ldm|diffusers|official-motion|kohya|…`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from animatediff.checkpoints.cameractrl_files import read_camera_parts, write_cameractrl
from animatediff.checkpoints.controlnet_files import read_controlnet_parts, write_controlnet
from animatediff.checkpoints.export import (
    write_diffusers,
    write_hotshot_motion,
    write_ldm,
    write_motion_adapter,
    write_official_motion,
    write_vae,
)
from animatediff.checkpoints.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from animatediff.checkpoints.image_encoder_files import read_image_encoder_parts, write_image_encoder
from animatediff.checkpoints.ip_adapter_files import read_ip_adapter_parts, write_ip_adapter
from animatediff.checkpoints.lora_files import in_dialect, read_lora, write_lora
from animatediff.checkpoints.parts import read_image_parts, read_motion_parts, read_vae_parts
from animatediff.checkpoints.sparsectrl_files import read_sparsectrl_parts, write_sparsectrl
from animatediff.checkpoints.textual_inversion import write_textual_inversion
from animatediff.config.networks import MOTION_VERSIONS
from animatediff.utils import Parser, UserError, run_main

Converter = Callable[..., tuple[Sequence[str], Sequence[str]]]  # notes, and what was left out


@dataclass(frozen=True)
class Format:
    """`summary` completes "wrote OUT, …"; folder: whether OUT is one."""

    summary: str
    convert: Converter
    folder: bool = False


def through(read: Callable[[Path], Any], write: Callable[..., Any]) -> Converter:
    def convert(source: Path, target: Path, **given: str | None) -> tuple[Sequence[str], Sequence[str]]:
        parts = read(source)
        write(parts, target, **given)
        return parts.notes, parts.unused

    return convert


def lora(dialect: str) -> Converter:
    def convert(source: Path, target: Path) -> tuple[Sequence[str], Sequence[str]]:
        read = read_lora(source)
        write_lora(in_dialect(read, dialect), target)
        return (), (*read.unread, *(f"bundle_emb.{word}" for word in read.embeddings))

    return convert


def embedding(*, diffusers: bool) -> Converter:
    def convert(source: Path, target: Path) -> tuple[Sequence[str], Sequence[str]]:
        write_textual_inversion(source, target, diffusers=diffusers)
        return (), ()

    return convert


CONTROLNET = through(read_controlnet_parts, write_controlnet)
SPARSECTRL = through(read_sparsectrl_parts, write_sparsectrl)
VAE = through(read_vae_parts, write_vae)
IMAGE_ENCODER = through(read_image_encoder_parts, write_image_encoder)
FORMATS = {
    "ldm": Format("an SD 1.x or SDXL single file", through(read_image_parts, write_ldm)),
    "diffusers": Format("a diffusers folder", through(read_image_parts, write_diffusers), folder=True),
    "vae": Format("a VAE in LDM keys", VAE),
    "diffusers-vae": Format("a VAE as a diffusers folder", VAE, folder=True),
    "official-motion": Format("a motion module in official keys", through(read_motion_parts, write_official_motion)),
    "hotshot-motion": Format("Hotshot-XL's module in its own keys", through(read_motion_parts, write_hotshot_motion)),
    "diffusers-motion": Format("a MotionAdapter folder", through(read_motion_parts, write_motion_adapter), folder=True),
    "kohya": Format("a LoRA in kohya's keys", lora("kohya")),
    "diffusers-lora": Format("a LoRA in diffusers' (PEFT) keys", lora("diffusers")),
    "official-lora": Format("a MotionLoRA or domain adapter in official keys", lora("official")),
    "embedding": Format("a textual inversion in web UIs' key", embedding(diffusers=False)),
    "diffusers-embedding": Format("a textual inversion under its token", embedding(diffusers=True)),
    "controlnet": Format("a ControlNet in the original keys", CONTROLNET),
    "diffusers-controlnet": Format("a ControlNet as a diffusers folder", CONTROLNET, folder=True),
    "sparsectrl": Format("a SparseCtrl encoder in official keys", SPARSECTRL),
    "diffusers-sparsectrl": Format("a SparseCtrl encoder as a diffusers folder", SPARSECTRL, folder=True),
    "ip-adapter": Format("an IP-Adapter in the released keys", through(read_ip_adapter_parts, write_ip_adapter)),
    "image-encoder": Format("an image encoder as a transformers folder", IMAGE_ENCODER, folder=True),
    "open-clip": Format("an image encoder in OpenCLIP's keys", IMAGE_ENCODER),
    "cameractrl": Format("CameraCtrl in one file", through(read_camera_parts, write_cameractrl)),
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    to = FORMATS[args.to]
    check_output(args.input, args.output, to, overwrite=args.overwrite)
    if args.version and not args.to.endswith("motion"):
        raise UserError(
            f"got --version {args.version} with --to {args.to}, expected it for motion modules only: drop it"
        )
    given = {"version": args.version} if args.version else {}
    notes, unused = to.convert(args.input, args.output, **given)
    print(f"wrote {args.output}, {to.summary}, from {args.input}")
    for note in notes:
        print(f"  note: {note}")
    if unused:
        print(f"  left out {len(unused)} entries: {', '.join(unused[:5])}{' …' * (len(unused) > 5)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Convert weights between file formats.")
    parser.add_argument("input", type=Path, metavar="IN", help="file or folder of any format")
    parser.add_argument("output", type=Path, metavar="OUT", help="file (.safetensors, .ckpt, …) or folder to write")
    formats = "; ".join(f"{name}: {row.summary}" for name, row in FORMATS.items())
    parser.add_argument("--to", required=True, choices=FORMATS, help=formats)
    parser.add_argument("--version", choices=MOTION_VERSIONS, help="of a motion module whose file does not tell")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser.parse_args(argv)


def check_output(source: Path, target: Path, to: Format, *, overwrite: bool) -> None:
    """Refuse before anything is read.

    Raises:
        UserError: OUT is IN, exists, or has the name of a file where a folder is written (or the other way round).
    """
    weights = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"got {source} as IN and {target} as OUT, expected two places: choose another OUT")
    if target.exists() and not overwrite:
        raise UserError(f"got {target} as OUT, which exists: choose another name, or add --overwrite")
    if not to.folder and (target.suffix not in weights or target.is_dir()):
        raise UserError(f"got {target} as OUT, expected a file name ending in {', '.join(weights)}: rename it")
    if to.folder and target.suffix in weights:
        raise UserError(f"got {target} as OUT, expected the name of a folder, which {to.summary} is: rename it")


if __name__ == "__main__":
    run_main(main)
