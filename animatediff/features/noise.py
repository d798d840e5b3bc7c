"""What the noise of a clip's frames has in common, so that a long clip, or a still one, keeps what it shows.

`shuffle` is FreeNoise's (arXiv 2310.15169, sec. 3.2): every stretch of `length` frames has the same noise frames in
another order, so windows start from the same material. The paper lets the temporal attention alone see windows, layer
by layer, on all frames at once. Here the whole network sees one window at a time (`windows.py`), which is not the same
function, but has the same aim, memory that does not grow with the clip, and borders that move at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEFAULT_LENGTH, DEFAULT_STRIDE = 16, 4  # the paper's, for a clip without windows


def arrange_noise(
    noise: Tensor,
    kind: str,
    generators: Sequence[torch.Generator],
    *,
    length: int = DEFAULT_LENGTH,
    stride: int = DEFAULT_STRIDE,
) -> Tensor:
    """Noise whose later frames are those of the first `length`; each frame alone stays standard normal.

    Args:
        noise: (b, f, c, h, w), independent.
        kind: one of `NOISE_TYPES`: "random" as it is; "shuffle" the noise of `length` frames before, shuffled within
            blocks of `stride` frames; "repeat" the first `length` frames again and again; "constant" the first frame.
        generators: of the clips (b); they draw the orders.

    Returns:
        Of the same shape.
    """
    frames = noise.shape[1]
    if kind == "shuffle":
        orders = [_shuffled(frames, length, stride, generator) for generator in generators]
    elif kind == "random":
        return noise
    else:
        orders = [[frame % length if kind == "repeat" else 0 for frame in range(frames)]] * len(noise)
    return torch.stack([clip[order] for clip, order in zip(noise, orders, strict=True)])


def _shuffled(frames: int, length: int, stride: int, generator: torch.Generator) -> list[int]:
    """Which of the first `length` frames' noise each frame gets; the last block may be shorter, none is left out."""
    order = list(range(min(length, frames)))
    while len(order) < frames:
        block = order[len(order) - length :][:stride]
        mixed = torch.randperm(len(block), generator=generator, device=generator.device).tolist()
        order += [block[i] for i in mixed]
    return order[:frames]
