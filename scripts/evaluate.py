"""Measure a model in the built-in world: `python scripts/evaluate.py --captions 200`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not scripts/: scripts/inspect.py must not shadow the standard module
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import datetime

from animatediff.config import load_config
from animatediff.utils import UserError, run_main

BUNDLED = Path(__file__).resolve().parents[1] / "configs" / "animate" / "shapes.yaml"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default=BUNDLED, help="prompt config that names the model; by default the bundled")
    parser.add_argument("--motion", metavar="FILE", help="another motion module; none: every frame on its own")
    parser.add_argument("--captions", type=int, default=200, help="clips to make and score (200)")
    parser.add_argument("--batch", type=int, default=8, help="clips made at a time (8)")
    parser.add_argument("--steps", type=int, help="by default the config's")
    parser.add_argument("--guidance-scale", type=float, help="by default the config's")
    parser.add_argument("--seed", type=int, default=1, help="of the series of captions; the model was trained on 0 (1)")
    parser.add_argument("--output-dir", help="by default samples/evaluation-<time>")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default float16 on CUDA, else float32")
    args = parser.parse_args(argv)
    if args.captions < 1 or args.batch < 1 or args.seed < 0:
        raise UserError(
            f"got --captions {args.captions} --batch {args.batch} --seed {args.seed}, expected at least 1, 1 and 0"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    given = {"steps": args.steps, "guidance_scale": args.guidance_scale, "motion_module": args.motion}
    overrides = {key: value for key, value in given.items() if value is not None}
    if args.motion == "none":
        overrides["motion_module"] = ""
    entry = load_config(args.config, overrides).entries[0]

    # Here, because these import torch: mistakes above are told at once.
    from animatediff.evaluation.run_shapes import evaluate_shapes
    from animatediff.evaluation.shapes_report import format_table
    from animatediff.pipelines.animate import AnimateDiffPipeline
    from animatediff.pipelines.components import seeded
    from animatediff.pipelines.weights import check_entries

    pipeline = AnimateDiffPipeline.from_config(args.config, device=args.device, dtype=args.dtype, **overrides)
    for line in pipeline.components.reports:
        print(line, file=sys.stderr)

    (checked,) = check_entries([entry])
    sampling = checked.sampling

    def generate(captions: list[str], seeds: list[int]):
        clips = pipeline(
            captions,
            num_frames=entry.L,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            eta=sampling.eta,
            sampler=sampling.sampler,
            timestep_spacing=sampling.timestep_spacing,
            timesteps=sampling.timesteps,
            negative_prompt=entry.n_prompt[0],
            generator=[seeded(seed) for seed in seeds],
            output_type="pt",
        )
        return clips.frames * 2 - 1

    time = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    folder = Path(args.output_dir or f"samples/evaluation-{time}")
    settings = {
        "model": entry.pretrained_model_path,
        "motion_module": entry.motion_module or "none",
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
    }
    result = evaluate_shapes(
        generate, captions=args.captions, seed=args.seed, batch=args.batch, output_dir=folder, settings=settings
    )
    print(format_table({name: result[name] for name in ("generated", "shuffled", "rendered")}))
    print(folder)


if __name__ == "__main__":
    run_main(main)
