"""Attention along the frames of a clip: the forward kernel.

One program takes a few (pixel, head) pairs, its items, and for each the whole frames x frames problem: one batched
matrix product, a softmax without any running maximum, another product. It reads q, k and v where the projection left
them, at the stride of a frame, so nothing is permuted or copied.
"""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.temporal_attention.launches import FORWARD, tiles


@triton.jit
def items(
    pixels,
    FRAMES: tl.constexpr,
    HEADS: tl.constexpr,
    FRAME_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PIXEL_BLOCK: tl.constexpr,
):
    """Row, pixel and head of this program's items, each (items, frames, 1), and which of them exist."""
    pid = tl.program_id(0)
    head_blocks: tl.constexpr = (HEADS + HEAD_BLOCK - 1) // HEAD_BLOCK
    pixel_blocks = (pixels + PIXEL_BLOCK - 1) // PIXEL_BLOCK
    item = tl.arange(0, PIXEL_BLOCK * HEAD_BLOCK)
    head = pid % head_blocks * HEAD_BLOCK + item % HEAD_BLOCK
    pixel = pid // head_blocks % pixel_blocks * PIXEL_BLOCK + item // HEAD_BLOCK
    clip = pid // head_blocks // pixel_blocks
    frame = tl.arange(0, FRAME_BLOCK)
    row = clip.to(tl.int64) * FRAMES + frame
    valid = ((pixel < pixels) & (head < HEADS))[:, None, None] & (frame < FRAMES)[None, :, None]
    return row[None, :, None], pixel[:, None, None], head[:, None, None], valid


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    out,
    row_stride,  # of q, k and v: from one frame to the next
    token_stride,  # from one pixel to the next
    pixels,
    scale,  # of the scores, with log2(e) in it
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
    low = tl.arange(0, LOW)[None, None, :]
    at_low, in_low = at + low, valid & (low < WIDTH)

    q_low = tl.load(q + at_low, mask=in_low, other=0.0)
    k_low = tl.load(k + at_low, mask=in_low, other=0.0)
    v_low = tl.load(v + at_low, mask=in_low, other=0.0)
    scores = tl.dot(q_low, tl.permute(k_low, (0, 2, 1)), input_precision="tf32x3")
    if TAIL > 0:
        tail = LOW + tl.arange(0, TAIL)[None, None, :]
        at_tail, in_tail = at + tail, valid & (tail < WIDTH)
        q_tail = tl.load(q + at_tail, mask=in_tail, other=0.0)
        k_tail = tl.load(k + at_tail, mask=in_tail, other=0.0)
        v_tail = tl.load(v + at_tail, mask=in_tail, other=0.0)
        scores = tl.dot(q_tail, tl.permute(k_tail, (0, 2, 1)), acc=scores, input_precision="tf32x3")
    scores = tl.where(tl.arange(0, FRAME_BLOCK)[None, None, :] < FRAMES, scores * scale, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    p = (p / tl.sum(p, 2)[:, :, None]).to(v_low.dtype)

    at = (row * pixels + pixel) * HEADS * WIDTH + head * WIDTH
    tl.store(out + at + low, tl.dot(p, v_low, input_precision="tf32x3").to(out.dtype.element_ty), mask=in_low)
    if TAIL > 0:
        tl.store(out + at + tail, tl.dot(p, v_tail, input_precision="tf32x3").to(out.dtype.element_ty), mask=in_tail)


def forward(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    """q, k, v: ((b frames), s, num_heads * head_dim), of equal strides and unit stride in the last axis."""
    n, s, width = q.shape
    out = q.new_empty(n, s, width)
    programs, sizes = tiles(FORWARD, q, frames, num_heads)
    scale = (width // num_heads) ** -0.5 * launch.LOG2_E
    launch.run(forward_kernel, programs, q, k, v, out, q.stride(0), q.stride(1), s, scale, **sizes)
    return out
