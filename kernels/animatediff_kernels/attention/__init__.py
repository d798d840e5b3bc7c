"""Scaled dot-product attention of token matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.attention.op import attention_op
from animatediff_kernels.attention.reference import attention_reference
from animatediff_kernels.calibration import Inputs, Kernels
from animatediff_kernels.dispatch import Call, run

MAX_BATCH = 32_768  # rows per call: CUDA attention kernels put the batch on a grid axis that ends at 65,535


def attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, backend: str | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v, heads packed in the last axis, no mask.

    Args:
        q: (n, s, num_heads * head_dim). k, v: (n, l, num_heads * head_dim), or (n / r, l, …) where r consecutive
            rows of q share keys and values: the frames of a clip attend to one text without copies of it.
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: (n, s, num_heads * head_dim).
    Raises: ValueError for shapes that do not fit, and where "triton" is asked for and cannot be had.
    """
    n, s, width = q.shape
    rows, tokens = k.shape[:2]
    if n % rows:
        raise ValueError(f"got {n} query rows and {rows} key rows, expected a multiple")
    if width % num_heads:
        raise ValueError(f"got a width of {width}, expected a multiple of num_heads={num_heads}")
    if not k.shape == v.shape == (rows, tokens, width):
        raise ValueError(f"got k {(*k.shape,)}, v {(*v.shape,)}, expected q's width in both")
    head_dim = width // num_heads
    itself = (rows, tokens) == (n, s)  # an image attends to itself or to a text
    seen = {"tokens": s} if itself else {"keys": tokens, "shared": int(rows < n)}
    call = Call.of("attention", q, k, v, rows=n * s, head_dim=head_dim, **seen)
    return run(call, backend, KERNELS, (q, k, v), num_heads=num_heads)


def _torch(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    by_head = (x.reshape(len(k), -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2) for x in (q, k, v))
    return sdpa(*by_head).transpose(1, 2).reshape(q.shape)


def _tail(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Inputs, Any]:
    """The last queries of the last image, which need no others; of an image that attends to itself, all keys."""
    q, k, v = inputs
    part = slice(-1, None), slice(-min(256, q.shape[1]), None)
    return (q[part], k[-1:], v[-1:]), part


KERNELS = Kernels(
    triton=lambda q, k, v, num_heads: attention_op(q, k, v, num_heads)[0],
    torch=_torch,
    reference=attention_reference,
    tail=_tail,
    attends=True,
)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of (n, heads, s, head_dim) in slices of at most MAX_BATCH rows."""
    if q.shape[0] <= MAX_BATCH:
        return F.scaled_dot_product_attention(q, k, v)
    out = q.new_empty(q.shape)
    for start in range(0, q.shape[0], MAX_BATCH):
        part = slice(start, start + MAX_BATCH)
        out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part])
    return out
