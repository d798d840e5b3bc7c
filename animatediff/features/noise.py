"""The start noise of clips, from seeds; and noise whose frames have something in common, so that a clip stays the same.

`shuffle` is FreeNoise's (arXiv 2310.15169, sec. 3.2): every stretch of `length` frames has the same noise frames in
another order, so windows start from the same material. The paper lets the temporal attention alone see windows, layer
by layer, on all frames at once. Here the whole network sees one window at a time (`windows.py`), which is not the same
function, but has the same aim, memory that does not grow with the clip, and borders that move at every step.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from animatediff.utils import UserError

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
        kind: of `Noise.type`: "random" as it is; "shuffle" the noise of `length` frames before, shuffled within
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


def draw_seed() -> int:
    """A seed from the system's randomness, 0 … 2^64 - 1; torch's own generators are left alone."""
    return secrets.randbits(64)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator: equal seeds give equal noise on every device.

    Raises:
        UserError: the seed is not within 0 … 2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"got seed {seed}, expected 0 to 2^64 - 1")
    return torch.Generator("cpu").manual_seed(seed)


def make_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The start of a clip, as `torch.manual_seed(seed); torch.randn(shape)` gives it on the CPU.

    Args:
        seed: 0 … 2^64 - 1.
        shape: (1, c, f, h, w), the order in which the official code draws.

    Returns:
        Standard normal float32 (1, f, c, h, w) on the CPU.
    """
    return draw_noise([seeded(seed)], shape[1:])


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Noise of clips that each have a generator (or share one, in turn), whatever else is in the batch.

    Args:
        generators: one per clip, on any device.
        shape: (c, f, h, w) of one clip.

    Returns:
        Standard normal float32 (b, f, c, h, w) on the CPU.
    """
    clips = [torch.randn(1, *shape, generator=g, device=g.device).cpu() for g in generators]
    return rearrange(torch.cat(clips), "b c f h w -> b f c h w")
