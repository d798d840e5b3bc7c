"""Attention along the frames of a clip: the backward kernel.

The probabilities P are computed again, which needs neither the forward's output nor its normalisers:
dV = P'dO, dP = dO V', dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS'Q. Every program owns its items: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.temporal_attention.launches import BACKWARD, tiles
from animatediff_kernels.temporal_attention.triton_fwd import items


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
    LOW: tl.constexpr,
    TAIL: tl.constexpr,
):
    row, pixel, head, valid = items(pixels, FRAMES, HEADS, FRAME_BLOCK, HEAD_BLOCK, PIXEL_BLOCK)
    at = row * row_stride + pixel * token_stride + head * WIDTH
    at_out = (row * pixels + pixel) * HEADS * WIDTH + head * WIDTH
    low = tl.arange(0, LOW)[None, None, :]
    in_low = valid & (low < WIDTH)

    q_low = tl.load(q + at + low, mask=in_low, other=0.0)
    k_low = tl.load(k + at + low, mask=in_low, other=0.0)
    v_low = tl.load(v + at + low, mask=in_low, other=0.0)
    do_low = tl.load(dout + at_out + low, mask=in_low, other=0.0)
    scores = tl.dot(q_low, tl.permute(k_low, (0, 2, 1)), input_precision="tf32x3")
    dp = tl.dot(do_low, tl.permute(v_low, (0, 2, 1)), input_precision="tf32x3")
    if TAIL > 0:
        tail = LOW + tl.arange(0, TAIL)[None, None, :]
        in_tail = valid & (tail < WIDTH)
        q_tail = tl.load(q + at + tail, mask=in_tail, other=0.0)
        k_tail = tl.load(k + at + tail, mask=in_tail, other=0.0)
        v_tail = tl.load(v + at + tail, mask=in_tail, other=0.0)
        do_tail = tl.load(dout + at_out + tail, mask=in_tail, other=0.0)
        scores = tl.dot(q_tail, tl.permute(k_tail, (0, 2, 1)), acc=scores, input_precision="tf32x3")
        dp = tl.dot(do_tail, tl.permute(v_tail, (0, 2, 1)), acc=dp, input_precision="tf32x3")
    scores = tl.where(tl.arange(0, FRAME_BLOCK)[None, None, :] < FRAMES, scores * log2_scale, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    p = p / tl.sum(p, 2)[:, :, None]
    ds = (p * (dp - tl.sum(p * dp, 2)[:, :, None]) * scale).to(q_low.dtype)
    ds_t = tl.permute(ds, (0, 2, 1))
    p_t = tl.permute(p.to(q_low.dtype), (0, 2, 1))

    kind = dq.dtype.element_ty
    at = row * grad_row_stride + pixel * grad_token_stride + head * WIDTH
    tl.store(dv + at + low, tl.dot(p_t, do_low, input_precision="tf32x3").to(kind), mask=in_low)
    tl.store(dq + at + low, tl.dot(ds, k_low, input_precision="tf32x3").to(kind), mask=in_low)
    tl.store(dk + at + low, tl.dot(ds_t, q_low, input_precision="tf32x3").to(kind), mask=in_low)
    if TAIL > 0:
        tl.store(dv + at + tail, tl.dot(p_t, do_tail, input_precision="tf32x3").to(kind), mask=in_tail)
        tl.store(dq + at + tail, tl.dot(ds, k_tail, input_precision="tf32x3").to(kind), mask=in_tail)
        tl.store(dk + at + tail, tl.dot(ds_t, q_tail, input_precision="tf32x3").to(kind), mask=in_tail)


def backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, frames: int, num_heads: int
) -> None:
    """Write dq, dk and dv, of equal strides. q, k, v as in `forward`; dout: as the forward's output, contiguous."""
    s, width = q.shape[1:]
    programs, sizes = tiles(BACKWARD, q, frames, num_heads)
    strides = (q.stride(0), q.stride(1), dq.stride(0), dq.stride(1))
    scale = (width // num_heads) ** -0.5
    launch.run(backward_kernel, programs, q, k, v, dout, dq, dk, dv, *strides, s, scale, scale * launch.LOG2_E, **sizes)
