"""Attention along the frames of a clip, every pixel on its own."""

from __future__ import annotations

from torch import Tensor

from animatediff_kernels.attention import sdpa
from animatediff_kernels.dispatch import Call, choose
from animatediff_kernels.temporal_attention.op import temporal_attention_op


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, frames: int, num_heads: int, backend: str | None = None
) -> Tensor:
    """Every token attends to the tokens at its own place in all frames of its clip.

    Args:
        q, k, v: ((b frames), s, num_heads * head_dim).
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: ((b frames), s, num_heads * head_dim).
    Raises: ValueError where "triton" is asked for and cannot be had.
    """
    call = Call.of("temporal_attention", q, k, v, frames=frames, head_dim=q.shape[-1] // num_heads)
    if choose(call, backend).backend == "triton":
        return temporal_attention_op([q, k, v], frames, num_heads)
    return _torch(q, k, v, frames, num_heads)


def temporal_attention_packed(qkv: Tensor, *, frames: int, num_heads: int, backend: str | None = None) -> Tensor:
    """`temporal_attention` of a joint projection ((b frames), s, 3 * num_heads * head_dim), without copies of it."""
    call = Call.of("temporal_attention", qkv, frames=frames, head_dim=qkv.shape[-1] // (3 * num_heads))
    if choose(call, backend).backend == "triton":
        return temporal_attention_op([qkv], frames, num_heads)
    return _torch(*qkv.chunk(3, dim=-1), frames, num_heads)


def _torch(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    n, s, width = q.shape
    b, head_dim = n // frames, width // num_heads

    def by_pixel(x: Tensor) -> Tensor:  # -> ((b s), heads, frames, head_dim)
        x = x.reshape(b, frames, s, num_heads, head_dim).permute(0, 2, 3, 1, 4)
        return x.reshape(b * s, num_heads, frames, head_dim)

    out = sdpa(by_pixel(q), by_pixel(k), by_pixel(v))
    return out.reshape(b, s, num_heads, frames, head_dim).permute(0, 3, 1, 2, 4).reshape(n, s, width)
