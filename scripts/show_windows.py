"""Draw the windows of frames that a long clip is animated in, step by step.

python scripts/show_windows.py --L 40 --steps 4 --schedule open --png windows.png

A row is a window, a column a frame: `#` where the window alone decides about the frame, a digit for its share in tenths
where windows overlap (0: less than a twentieth), `.` for a frame outside.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from animatediff.config.refusals import window_refusals
from animatediff.config.request import Request, Windows
from animatediff.features.windows import FUSIONS, SCHEDULES, window_weights, windows_of_step
from animatediff.media.pictures import write_picture
from animatediff.utils import Parser, UserError, run_main

CELL = 8  # pixels of a frame in the picture
FULL, SHARED, NONE = (38, 70, 120), (216, 226, 240), (255, 255, 255)


def shares(windows: Windows, step: int, frames: int) -> Tensor:
    """The part that each window of a step has in each frame, float32 (windows, frames); columns sum to 1."""
    cut = windows_of_step(windows, step, frames)
    weights = torch.zeros(len(cut), frames)
    for row, window in zip(weights, cut, strict=True):
        row[list(window)] = window_weights(windows, window, frames)
    return weights / weights.sum(0)


def as_text(step: int, parts: Tensor) -> str:
    def symbol(share: float) -> str:
        return "." if share == 0 else "#" if share > 0.95 else str(min(round(share * 10), 9))

    return "\n".join([f"step {step}", *("".join(symbol(share) for share in row) for row in parts.tolist())])


def as_picture(steps: list[Tensor]) -> Image.Image:
    """All steps below each other, the darker the larger the share."""
    gap = torch.zeros(1, steps[0].shape[1])
    parts = torch.cat([torch.cat([part, gap]) for part in steps])[:-1, :, None]
    shaded = torch.tensor(SHARED) + parts * (torch.tensor(FULL) - torch.tensor(SHARED))
    pixels = torch.where(parts > 0, shaded, torch.tensor(NONE).float()).round().to(torch.uint8)
    return Image.fromarray(pixels.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1).numpy())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--L", type=int, default=64, help="frames of the clip (64)")
    parser.add_argument("--steps", type=int, default=8, help="steps to draw (8)")
    parser.add_argument("--schedule", default="open", help=f"{', '.join(SCHEDULES)} (open)")
    parser.add_argument("--length", type=int, default=16, help="frames of a window (16)")
    parser.add_argument("--overlap", type=int, help="frames that neighbours share (a quarter of the length)")
    parser.add_argument("--fuse", default="pyramid", help=f"{', '.join(FUSIONS)} (pyramid)")
    parser.add_argument("--stride", type=int, default=1, help="levels of the uniform schedule (1)")
    parser.add_argument("--png", type=Path, help="a file to draw to as well")
    args = parser.parse_args(argv)
    if args.L < 1 or args.steps < 1:
        raise UserError(f"got --L {args.L} --steps {args.steps}, expected at least 1 of each")
    overlap = args.length // 4 if args.overlap is None else args.overlap
    windows = Windows(args.schedule, args.length, overlap, args.fuse, args.stride)
    if mistake := next(window_refusals(Request(windows=windows)), None):
        raise UserError(mistake.replace("{", "").replace("}", ""))
    steps = [shares(windows, step, args.L) for step in range(args.steps)]
    print("\n".join(as_text(step, parts) for step, parts in enumerate(steps)))
    seen = sum(len(window) for step in range(args.steps) for window in windows_of_step(windows, step, args.L))
    print(f"the network sees every frame {seen / args.steps / args.L:.2f} times a step")
    if args.png:
        write_picture(as_picture(steps), Path(args.png))
        print(args.png)


if __name__ == "__main__":
    run_main(main)
