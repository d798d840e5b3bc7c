"""Attention along the frames of a clip, every pixel on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from animatediff_kernels.attention import sdpa
from animatediff_kernels.calibration import Inputs, Kernels
from animatediff_kernels.dispatch import Call, run
from animatediff_kernels.temporal_attention.op import temporal_attention_op
from animatediff_kernels.temporal_attention.reference import temporal_attention_reference


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, frames: int, num_heads: int, backend: str | None = None
) -> Tensor:
    """Every token attends to the tokens at its own place in all frames of its clip.

    Args:
        q, k, v: ((b frames), s, num_heads * head_dim).
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: ((b frames), s, num_heads * head_dim).
    Raises: ValueError for shapes that do not fit, and where "triton" is asked for and cannot be had.
    """
    n, s, width = q.shape
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"got q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}, expected one shape")
    if n % frames:
        raise ValueError(f"got {n} images, expected a multiple of frames={frames}")
    if width % num_heads:
        raise ValueError(f"got a width of {width}, expected a multiple of num_heads={num_heads}")
    call = Call.of("temporal_attention", q, k, v, rows=n * s, frames=frames, head_dim=width // num_heads)
    return run(call, backend, KERNELS, (q, k, v), frames=frames, num_heads=num_heads)


def _torch(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    """One clip at a time: all its pixels are then one stride apart, and nothing is copied but the result."""
    n, s, width = q.shape

    def by_pixel(x: Tensor) -> Tensor:  # -> (b, s, heads, frames, head_dim)
        return x.reshape(n // frames, frames, s, num_heads, width // num_heads).permute(0, 2, 3, 1, 4)

    clips = zip(by_pixel(q), by_pixel(k), by_pixel(v), strict=True)
    return torch.stack([sdpa(*clip).permute(2, 0, 1, 3) for clip in clips]).reshape(n, s, width)


def _tail(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Inputs, Any]:
    """The last pixels of the last clip."""
    part = slice(-options["frames"], None), slice(-64, None)
    return [x[part] for x in inputs], part


KERNELS = Kernels(
    triton=lambda q, k, v, frames, num_heads: temporal_attention_op(q, k, v, frames, num_heads),
    torch=_torch,
    reference=temporal_attention_reference,
    tail=_tail,
    attends=True,
)
