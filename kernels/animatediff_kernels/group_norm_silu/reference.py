"""GroupNorm (Wu and He 2018, arXiv 1803.08494, Eq. 1-3) and SiLU, as the maths has it."""

from torch import Tensor


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float, frames: int, silu: bool
) -> Tensor:
    """x and the result: ((b frames), c, h, w); one mean and variance per group and `frames` images."""
    groups = shifted(x, shift).reshape(x.shape[0] // frames, frames, num_groups, -1)
    mean = groups.mean((1, 3), keepdim=True)
    variance = groups.var((1, 3), unbiased=False, keepdim=True)
    y = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return y * y.sigmoid() if silu else y


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """x (n, c, h, w) plus shift (n / r, c), of which r consecutive images share a row."""
    return x if shift is None else x + shift.repeat_interleave(len(x) // len(shift), 0)[:, :, None, None]
