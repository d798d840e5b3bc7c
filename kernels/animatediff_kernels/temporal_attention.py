"""Attention along the frames of a clip, every pixel on its own."""

from __future__ import annotations

from torch import Tensor

from animatediff_kernels.attention import sdpa


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, *, frames: int, num_heads: int) -> Tensor:
    """Every token attends to the tokens at its own place in all frames of its clip.

    Args:
        q, k, v: ((b frames), s, num_heads * head_dim).
    Returns: ((b frames), s, num_heads * head_dim).
    """
    n, s, width = q.shape
    b, head_dim = n // frames, width // num_heads

    def by_pixel(x: Tensor) -> Tensor:  # -> ((b s), heads, frames, head_dim)
        x = x.reshape(b, frames, s, num_heads, head_dim).permute(0, 2, 3, 1, 4)
        return x.reshape(b * s, num_heads, frames, head_dim)

    out = sdpa(by_pixel(q), by_pixel(k), by_pixel(v))
    return out.reshape(b, s, num_heads, frames, head_dim).permute(0, 3, 1, 2, 4).reshape(n, s, width)
