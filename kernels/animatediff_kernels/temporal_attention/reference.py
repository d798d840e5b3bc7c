"""Attention along the frames of a clip, as the maths has it."""

import torch
from torch import Tensor


def temporal_attention_reference(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    """q, k, v and the result: ((b frames), s, num_heads * head_dim)."""
    shape = (-1, frames, q.shape[1], num_heads, q.shape[2] // num_heads)
    q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
    scores = torch.einsum("bishd,bjshd->bshij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bshij,bjshd->bishd", scores.softmax(-1), v).flatten(3).flatten(0, 1)
