"""Measure a model on Shapes, the toy data set, or any clips.

`python scripts/evaluate.py --captions 200`             makes clips of Shapes, the toy data set, and reads them back
`python scripts/evaluate.py --videos samples/my-run`    does it move, how evenly, does it flicker, does it loop?
    `--clip [FOLDER]`         is it what its prompt says, do its frames agree? By the world's encoder or a local CLIP
    `--reference IMAGES`      does it look like these, pictures of the same personalised model?
    `--fvd-against VIDEOS`    Fréchet video distance to these

docs/evaluation.md says what every number means.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path

from animatediff.config.prompt_yaml import BUNDLED, load_config
from animatediff.utils import Parser, UserError, printable, run_main

WORLD = {  # options that make the clips of Shapes, the toy data set, and their defaults
    "config": BUNDLED,
    "entry": 0,
    "motion": None,
    "captions": 200,
    "batch": 8,
    "style": "plain",
    "motions": None,
    "prompt": None,
    "steps": None,
    "guidance_scale": None,
    "seed": 1,
    "device": "auto",
    "dtype": None,
}


WITH_VIDEOS = ("clip", "reference", "fvd_against", "fvd_features")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", metavar="PATH", help="measure these instead: files, folders of frames")
    parser.add_argument(
        "--clip",
        nargs="?",
        const="world",
        metavar="FOLDER",
        help="CLIP metrics, by a local CLIP (by the world's encoder)",
    )
    parser.add_argument("--reference", nargs="+", default=[], metavar="IMAGE", help="for the domain similarity")
    parser.add_argument("--fvd-against", nargs="+", default=[], metavar="PATH", help="clips to be compared with")
    parser.add_argument(
        "--fvd-features",
        metavar="FILE",
        help="TorchScript extractor, which is run, such as I3D (the encoder)",
    )
    parser.add_argument("--config", help="prompt config that names the model; by default the bundled")
    parser.add_argument("--entry", type=int, metavar="N", help="of the config, counted from 0 (0)")
    parser.add_argument("--motion", metavar="FILE", help="another motion module; none: every frame on its own")
    parser.add_argument("--captions", type=int, help="clips to make and score (200)")
    parser.add_argument("--batch", type=int, help="clips made at a time (8)")
    parser.add_argument("--style", help="that the model paints in: plain, neon, hatched or pixelated (plain)")
    parser.add_argument(
        "--motions", nargs="+", metavar="MOTION", help="asked for in turn; also zoom_in, zoom_out, orbit"
    )
    parser.add_argument(
        "--prompt",
        help="in place of every caption, such as 'a {shape} {motion}' or '': what do pictures say?",
    )
    parser.add_argument("--steps", type=int, help="by default the config's")
    parser.add_argument("--guidance-scale", type=float, help="by default the config's")
    parser.add_argument(
        "--seed",
        type=int,
        help="of the series of captions; the bundled files were trained on 0, 21 and 22 (1, held out)",
    )
    parser.add_argument("--output-dir", help="by default samples/evaluation-<time>")
    parser.add_argument("--device", help="auto, cuda, mps or cpu (auto)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default float16 on CUDA, else float32")
    args = parser.parse_args(argv)
    weights = _options(args, WITH_VIDEOS)
    given = _options(args, [name for name in WORLD if name != "device"])
    if args.videos and given:
        raise UserError(f"got --videos and {given}, expected one or the other: --videos measures clips that are there")
    if weights and not args.videos:
        raise UserError(f"got {weights} without --videos, expected both: give the clips that are to be measured")
    if args.fvd_features and not args.fvd_against:
        raise UserError("got --fvd-features without --fvd-against, expected both: give clips to compare with")
    for key, default in WORLD.items():
        if getattr(args, key) is None:
            setattr(args, key, default)
    if args.captions < 1 or args.batch < 1 or args.seed < 0:
        raise UserError(
            f"got --captions {args.captions} --batch {args.batch} --seed {args.seed}, expected at least 1, 1 and 0"
        )
    return args


def _options(args: argparse.Namespace, names: Iterable[str]) -> str:
    """Which of some options were given."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, []))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    time = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    folder = Path(args.output_dir or f"samples/evaluation-{time}")
    print(measure_videos(args, folder) if args.videos else measure_model(args, folder))
    print(folder)


def measure_videos(args: argparse.Namespace, folder: Path) -> str:
    """Measure the clips of some files and folders; returns the table."""
    # Here, because these import torch: mistakes above are told at once.
    from animatediff.metrics.fvd import EncoderFeatures, TorchScriptFeatures
    from animatediff.metrics.measure import evaluate_videos, format_table
    from animatediff.pipeline.device import pick_device
    from animatediff.world.encoder import WORLD, load_encoder

    device, encoder, extractor = pick_device(args.device), None, None
    if args.clip or args.reference or (args.fvd_against and not args.fvd_features):
        encoder = load_encoder(args.clip or WORLD, device=device)
    if args.fvd_features:
        extractor = TorchScriptFeatures(args.fvd_features, device=device)
    elif args.fvd_against:
        extractor = EncoderFeatures(encoder)
    result = evaluate_videos(
        args.videos,
        output_dir=folder,
        encoder=encoder if args.clip or args.reference else None,
        references=args.reference,
        extractor=extractor,
        against=args.fvd_against,
    )
    for reason in result["left_out"].values():
        print(f"left out: {printable(reason)}", file=sys.stderr)
    return format_table(result)


def measure_model(args: argparse.Namespace, folder: Path) -> str:
    """Make clips with a model and score them; returns the table."""
    given = {"steps": args.steps, "guidance_scale": args.guidance_scale, "motion_module": args.motion}
    overrides = {key: value for key, value in given.items() if value is not None}
    if args.motion == "none":
        overrides["motion_module"] = ""
    entries = load_config(args.config, overrides, complete=False).entries
    if not 0 <= args.entry < len(entries):
        raise UserError(
            f"got --entry {args.entry}, but {args.config} has {len(entries)}, expected 0 to {len(entries) - 1}"
        )
    entry = entries[args.entry]
    if len(entries) > 1:
        print(
            f"entry {entry.output.name} is measured, --entry {args.entry} of 0 to {len(entries) - 1}",
            file=sys.stderr,
        )

    # Here, because these import torch: mistakes above are told at once.
    from animatediff.lab.run_model import check_entry, pictured_clip_maker
    from animatediff.pipeline.headers import check_requests
    from animatediff.pipeline.pipeline import AnimateDiffPipeline
    from animatediff.world.evaluate import evaluate_shapes
    from animatediff.world.report import format_table
    from animatediff.world.series import World
    from animatediff.world.shapes import MOTIONS

    motions = args.motions or list(MOTIONS)
    world = World(args.captions, args.style, motions=tuple(motions), seed=args.seed)
    check_entry(entry)
    pipeline = AnimateDiffPipeline.from_config(
        args.config, entry=args.entry, device=args.device, dtype=args.dtype, **overrides
    )
    for line in pipeline.model.reports:
        print(line, file=sys.stderr)
    sampling = check_requests([entry], complete=False)[0].request.sampling
    settings = {
        "config": str(args.config),
        "entry": entry.output.name,
        "motions": motions,
        "model": entry.model.base,
        "motion_module": entry.model.motion_module or "none",
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "prompt": "the captions" if args.prompt is None else args.prompt,
    }
    make = pictured_clip_maker(pipeline, entry, world)
    result = evaluate_shapes(
        lambda captions, seeds: make(captions if args.prompt is None else world.said(args.prompt, seeds), seeds),
        captions=args.captions,
        seed=args.seed,
        batch=args.batch,
        style=args.style,
        motions=motions,
        output_dir=folder,
        settings=settings,
    )
    return format_table({name: result[name] for name in ("generated", "shuffled", "rendered")})


if __name__ == "__main__":
    run_main(main)
