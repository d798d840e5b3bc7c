"""Pictures in overlapping tiles, one at a time, which fade into each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4  # a tile's side is this many times what it shares with its neighbour


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, *, grow: int = 1, shrink: int = 1) -> Tensor:
    """What `function` makes of pictures x (n, c, h, w), tile by tile where they are larger than one.

    Args:
        function: (n, c, h, w) -> (n, d, h grow / shrink, w grow / shrink), of any size.
        tile: side of a tile in pixels of x, a multiple of `shrink`; 0: none.
    """
    h, w = x.shape[-2:]
    if not tile or max(h, w) <= tile:
        return function(x)
    out = total = None
    for top in starts(h, tile, shrink):
        for left in starts(w, tile, shrink):
            part = x[..., top : top + tile, left : left + tile]
            made = function(part)
            if out is None or total is None:
                out = made.new_zeros(*made.shape[:2], h * grow // shrink, w * grow // shrink)
                total = made.new_zeros(out.shape[-2:], dtype=torch.float32)
            at = [
                slice(a * grow // shrink, a * grow // shrink + n)
                for a, n in zip((top, left), made.shape[-2:], strict=True)
            ]
            ends = ((top > 0, top + tile < h), (left > 0, left + tile < w))
            down, across = (ramp(n, *inner) for n, inner in zip(made.shape[-2:], ends, strict=True))
            weight = (down[:, None] * across).to(made.device)
            out[..., at[0], at[1]] += made * weight.to(made)
            total[at[0], at[1]] += weight
            del made
    assert out is not None and total is not None
    return out.div_(total.to(out))


def starts(length: int, tile: int, multiple: int) -> list[int]:
    """Where the tiles of an axis begin: they cover it and share about a quarter of their side or more."""
    if length <= tile:
        return [0]
    apart = max((tile - tile // OVERLAP) // multiple, 1) * multiple
    return [*range(0, length - tile, apart), length - tile]


def ramp(length: int, before: bool, after: bool) -> Tensor:
    """Weights (length,) in (0, 1] that rise and fall over a quarter of the tile at each side with a neighbour."""
    fade = max(length // OVERLAP, 1)
    rising = ((torch.arange(length) + 1) / (fade + 1)).clamp(max=1)
    ones = torch.ones(length)
    return (rising if before else ones) * (rising.flip(0) if after else ones)
