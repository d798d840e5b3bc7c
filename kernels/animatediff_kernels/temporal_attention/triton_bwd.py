"""Attention along the frames of a clip: the backward kernel.

The probabilities P are computed again, which needs neither the forward's output nor its normalisers:
dV = P'dO, dP = dO V', dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS'Q. Every program owns its items: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.temporal_attention.launches import tiles
from animatediff_kernels.temporal_attention.triton_fwd import columns, items, product


@triton.jit
def backward_kernel(
    q,
    k,
    v,
    dout,
    dq,
    dk,
    dv,
    row_stride,  # of q, k and v
    token_stride,
    grad_row_stride,  # of dq, dk and dv
    grad_token_stride,
    pixels,
    scale,
    log2_scale,  # scale * log2(e)
    FRAMES: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FRAME_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PIXEL_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
):
    row, pixel, head, valid = items(pixels, FRAMES, HEADS, FRAME_BLOCK, HEAD_BLOCK, PIXEL_BLOCK)
    at = row * row_stride + pixel * token_stride + head * WIDTH
    at_out = (row * pixels + pixel) * HEADS * WIDTH + head * WIDTH

    scores = tl.zeros([HEAD_BLOCK * PIXEL_BLOCK, FRAME_BLOCK, FRAME_BLOCK], tl.float32)
    dp = tl.zeros([HEAD_BLOCK * PIXEL_BLOCK, FRAME_BLOCK, FRAME_BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, CHUNK):
        column = columns(start, WIDTH, CHUNK, LAST)
        there = valid & (column < WIDTH)
        queries = tl.load(q + at + column, mask=there, other=0.0)
        keys = tl.load(k + at + column, mask=there, other=0.0)
        values = tl.load(v + at + column, mask=there, other=0.0)
        grads = tl.load(dout + at_out + column, mask=there, other=0.0)
        scores = product(queries, tl.permute(keys, (0, 2, 1)), scores)
        dp = product(grads, tl.permute(values, (0, 2, 1)), dp)
    scores = tl.where(tl.arange(0, FRAME_BLOCK)[None, None, :] < FRAMES, scores * log2_scale, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    p = p / tl.sum(p, 2)[:, :, None]

    kind = dq.dtype.element_ty
    at_grad = row * grad_row_stride + pixel * grad_token_stride + head * WIDTH
    p_t = tl.permute(p.to(q.dtype.element_ty), (0, 2, 1))
    for start in tl.static_range(0, WIDTH, CHUNK):  # reads again what would else fill the registers
        column = columns(start, WIDTH, CHUNK, LAST)
        there = valid & (column < WIDTH)
        grads = tl.load(dout + at_out + column, mask=there, other=0.0)
        tl.store(dv + at_grad + column, product(p_t, grads).to(kind), mask=there)
    ds = (p * (dp - tl.sum(p * dp, 2)[:, :, None]) * scale).to(q.dtype.element_ty)
    ds_t = tl.permute(ds, (0, 2, 1))
    for start in tl.static_range(0, WIDTH, CHUNK):
        column = columns(start, WIDTH, CHUNK, LAST)
        there = valid & (column < WIDTH)
        keys = tl.load(k + at + column, mask=there, other=0.0)
        tl.store(dq + at_grad + column, product(ds, keys).to(kind), mask=there)
        queries = tl.load(q + at + column, mask=there, other=0.0)
        tl.store(dk + at_grad + column, product(ds_t, queries).to(kind), mask=there)


def backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, frames: int, num_heads: int
) -> None:
    """Write dq, dk and dv, of equal strides. q, k, v as in `forward`; dout: as the forward's output, contiguous."""
    s, width = q.shape[1:]
    programs, sizes = tiles(q, frames, num_heads)
    strides = (q.stride(0), q.stride(1), dq.stride(0), dq.stride(1))
    scale = (width // num_heads) ** -0.5
    launch.run(backward_kernel, programs, q, k, v, dout, dq, dk, dv, *strides, s, scale, scale * launch.LOG2_E, **sizes)
