"""GroupNorm of images or clips, and the SiLU that follows most of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.dispatch import Call, choose
from animatediff_kernels.group_norm_silu.op import group_norm_silu_op


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    frames: int = 1,
    silu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """silu(group_norm(x)) (Wu and He 2018, arXiv 1803.08494), or without the SiLU.

    Args:
        x: ((b frames), c, h, w), in any memory format, which the result shares; "auto" asks torch unless it is
            channels_last.
        weight, bias: (c,), of any dtype.
        frames: images whose statistics are pooled; 1 normalises every image by itself.
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Raises: ValueError where "triton" is asked for and cannot be had.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    sizes = {"channels": x.shape[1], "images": frames, "silu": int(silu), "channels_last": int(last)}
    call = Call.of("group_norm_silu", x, weights=(weight, bias), rows=x.numel() // x.shape[1], **sizes)
    if choose(call, backend).backend == "triton":
        return group_norm_silu_op(x, num_groups, weight, bias, eps, frames, silu)[0]
    if frames == 1:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    else:
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)
        y = F.group_norm(clip, num_groups, weight, bias, eps).transpose(1, 2).reshape(x.shape)
    return F.silu(y, inplace=not call.grad) if silu else y
