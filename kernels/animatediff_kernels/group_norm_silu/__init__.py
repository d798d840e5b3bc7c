"""GroupNorm of images or clips, and the SiLU that follows most of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.calibration import Inputs, Kernels
from animatediff_kernels.cpu import takes_channels_last
from animatediff_kernels.dispatch import Call, run
from animatediff_kernels.group_norm_silu.channels_last import group_norm_channels_last
from animatediff_kernels.group_norm_silu.op import group_norm_silu_op
from animatediff_kernels.group_norm_silu.reference import group_norm_silu_reference, shifted


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    frames: int = 1,
    silu: bool = True,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """silu(group_norm(x + shift)) (Wu and He 2018, arXiv 1803.08494), or without the SiLU.

    Args:
        x: ((b frames), c, h, w), in any memory format, which the result shares but for torch's on CUDA.
        weight, bias: (c,), of any dtype.
        frames: images whose statistics are pooled; 1 normalises every image by itself.
        shift: (n / r, c), of any dtype: what is added to all pixels of r consecutive images, such as the embedding of
            their time. None adds nothing.
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Raises: ValueError for shapes that do not fit, and where "triton" is asked for and cannot be had.
    """
    n, channels = x.shape[:2]
    if not weight.shape == bias.shape == (channels,):
        raise ValueError(f"got weight {(*weight.shape,)} and bias {(*bias.shape,)}, expected ({channels},)")
    if channels % num_groups:
        raise ValueError(f"got {channels} channels, expected a multiple of num_groups={num_groups}")
    if n % frames:
        raise ValueError(f"got {n} images, expected a multiple of frames={frames}")
    if shift is not None and not (shift.shape[1:] == (channels,) and n % len(shift) == 0):
        raise ValueError(f"got shift {(*shift.shape,)} for {n} images, expected (a divisor of it, {channels})")
    last = x.is_contiguous(memory_format=torch.channels_last)
    weights = (weight, bias) if shift is None else (weight, bias, shift)
    sizes = {"channels": channels, "images": frames, "silu": int(silu), "shift": int(shift is not None)}
    sizes |= {"channels_last": int(last)}
    call = Call.of("group_norm_silu", x, weights=weights, rows=x.numel() // channels, **sizes)
    options = {"num_groups": num_groups, "eps": eps, "frames": frames, "silu": silu}
    return run(call, backend, KERNELS, (x, weight, bias, shift), **options)


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, num_groups: int, eps: float, frames: int, silu: bool
) -> Tensor:
    if takes_channels_last(x):
        return group_norm_channels_last(x, weight, bias, shift, num_groups, eps, frames, silu)
    x = shifted(x, shift)
    if frames == 1:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    else:
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)
        y = F.group_norm(clip, num_groups, weight, bias, eps).transpose(1, 2).reshape(x.shape)
    return F.silu(y, inplace=not y.requires_grad) if silu else y


def _tail(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Inputs, Any]:
    """The images of the last clip, with their rows of the shift."""
    x, weight, bias, shift = inputs
    part = slice(-options["frames"], None)
    if shift is not None:
        shift = shift[-max(1, options["frames"] * len(shift) // len(x)) :]
    return (x[part], weight, bias, shift), part


KERNELS = Kernels(
    triton=lambda x, weight, bias, shift, num_groups, eps, frames, silu: group_norm_silu_op(
        x, num_groups, weight, bias, shift, eps, frames, silu
    )[0],
    torch=_torch,
    reference=lambda x, weight, bias, shift, num_groups, eps, frames, silu: group_norm_silu_reference(
        x, num_groups, weight, bias, shift, eps, frames, silu
    ),
    tail=_tail,
)
