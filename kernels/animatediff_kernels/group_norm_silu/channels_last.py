"""GroupNorm on CPUs of maps whose channels lie side by side, as the Winograd convolutions take and give them.

torch's own adds up such maps row by row, and squares that are not centred: the more pixels, the more digits it loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 2**17  # worked on at a time, 512 kB of float32: they stay in a core's cache


def group_norm_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, num_groups: int, eps: float, frames: int, silu: bool
) -> Tensor:
    """What `group_norm_silu` computes of a channels_last x ((b frames), c, h, w), in its layout. No gradients."""
    y = torch.empty_like(x)
    scale, offset = channel_affine(x, weight, bias, shift, num_groups=num_groups, eps=eps, frames=frames)
    rows, out = tokens(x), tokens(y)
    for at in parts(rows):
        torch.addcmul(offset[at[0]], rows[at], scale[at[0]], out=out[at])
        if silu:
            F.silu(out[at], inplace=True)
    return y


def channel_affine(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, *, num_groups: int, eps: float, frames: int
) -> tuple[Tensor, Tensor]:
    """Scale and offset of every channel, each (n, 1, c): `group_norm_silu` of x without its SiLU is x * scale + offset.

    The arguments are those of `group_norm_silu`; x is channels_last.
    """
    rows = tokens(x)
    n, pixels, c = rows.shape
    size = frames * pixels * c // num_groups  # numbers of a group

    def of_group(sums: Tensor) -> Tensor:
        """The group's mean for every channel, (n, 1, c), of sums over an image's pixels (n, c)."""
        groups = sums.double().view(n // frames, frames, num_groups, -1).sum((1, 3), keepdim=True) / size
        return groups.expand(-1, frames, -1, c // num_groups).reshape(n, 1, c)

    added = x.new_zeros(1, c) if shift is None else shift.repeat_interleave(n // len(shift), dim=0)
    centre = of_group(rows.sum(1) + pixels * added.double()) - added[:, None]  # of x itself
    minus, squares = centre.to(x.dtype), x.new_zeros(n, c)
    room = x.new_empty(max(NUMBERS, c))
    for at in parts(rows):
        read = rows[at]
        centred = torch.sub(read, minus[at[0]], out=room[: read.numel()].view(read.shape))
        squares[at[0]] += centred.square_().sum(1)
    scale = (of_group(squares) + eps).rsqrt() * weight.double()
    return scale.to(x.dtype), (bias.double() - centre * scale).to(x.dtype)


def tokens(x: Tensor) -> Tensor:
    """A view (n, h w, c) of a channels_last x (n, c, h, w)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def parts(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of (images, pixels, c): some whole images, or some pixels of one."""
    n, pixels, c = rows.shape
    images, high = max(1, NUMBERS // (pixels * c)), min(pixels, max(1, NUMBERS // c))
    for i, j in product(range(0, n, images), range(0, pixels, high)):
        yield slice(i, i + images), slice(j, j + high)
