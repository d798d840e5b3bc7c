"""Pictures larger than the network was trained on: overlapping tiles, whose predictions are fused.

It is windows (`windows.py`) in height and width (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113). It goes
directly around the network, before all features, none of which may hand in anything of the whole picture's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from animatediff.features.feature import Feature, FrameDenoise, Run


def tiles(size: int, overlap: int) -> Feature:
    """A feature that shows the network tiles of `size` latent pixels, of which neighbours share `overlap` or more."""

    @contextmanager
    def tiled(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
        def predict(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
            down, across = (tile_spans(side, size, overlap) for side in x.shape[-2:])
            if len(down) == len(across) == 1:
                return denoise(x, t, frames, **inputs)
            out, total = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
            for top, bottom in down:
                for left, right in across:
                    rows = tile_weights(top, bottom, x.shape[-2], overlap)
                    columns = tile_weights(left, right, x.shape[-1], overlap)
                    weight = (rows[:, None] * columns).to(x)
                    part = denoise(x[..., top:bottom, left:right], t, frames, **inputs)
                    out[..., top:bottom, left:right] += weight * part
                    total[top:bottom, left:right] += weight
            return out / total

        yield predict

    return tiled


def tile_spans(side: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """First and end of as few tiles as cover a side, at even distances, all of one size (the side's, if it is less)."""
    if side <= size:
        return [(0, side)]
    count = math.ceil((side - overlap) / (size - overlap))
    starts = (round(i * (side - size) / (count - 1)) for i in range(count))
    return [(start, start + size) for start in starts]


def tile_weights(first: int, end: int, side: int, overlap: int) -> Tensor:
    """How much the pixels of a tile count, (end - first,), above 0: 1, and a ramp at each border with a neighbour."""
    place, ramp = torch.arange(end - first) + 1.0, min(overlap, (end - first) // 2) + 1
    before = place / ramp if first > 0 else torch.ones_like(place)
    after = place.flip(0) / ramp if end < side else torch.ones_like(place)
    return torch.minimum(before, after).clamp(max=1)
