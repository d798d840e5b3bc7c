"""Scaled dot-product attention, as the maths has it."""

import torch
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q kT / sqrt(head_dim)) v; shapes as in `attention`."""
    images_per_row = q.shape[0] // k.shape[0]
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    k, v = k.repeat_interleave(images_per_row, 0), v.repeat_interleave(images_per_row, 0)
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).flatten(2)


def log_normaliser_reference(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """log2 of the sum of exponentials of every row of scores, (n, num_heads, s) float32."""
    images_per_row = q.shape[0] // k.shape[0]
    q, k = q.unflatten(-1, (num_heads, -1)).float(), k.unflatten(-1, (num_heads, -1)).float()
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k.repeat_interleave(images_per_row, 0)) * q.shape[-1] ** -0.5
    return scores.logsumexp(-1) / torch.log(torch.tensor(2.0))
