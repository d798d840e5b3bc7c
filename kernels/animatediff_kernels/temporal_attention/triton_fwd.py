"""Attention along the frames of a clip: the forward kernel.

One program takes a few (pixel, head) pairs, its items, and for each the whole frames x frames problem: one batched
matrix product, a softmax without any running maximum, another product. It reads q, k and v where the projection left
them, at the stride of a frame, so nothing is permuted or copied.
"""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.temporal_attention.launches import tiles


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
def product(a, b, acc=None):
    """a @ b + acc of every item. Triton 3.6 leaves an item of a batch to one warp, so a lone item is no batch."""
    if a.shape[0] == 1:
        flat = None if acc is None else tl.reshape(acc, acc.shape[1:])
        c = tl.dot(tl.reshape(a, a.shape[1:]), tl.reshape(b, b.shape[1:]), acc=flat, input_precision="tf32x3")
        return c[None, :, :]
    return tl.dot(a, b, acc=acc, input_precision="tf32x3")


@triton.jit
def columns(start: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """The columns of a head's chunk that begins at `start`: CHUNK of them, or LAST at the end."""
    return start + tl.arange(0, CHUNK if start + CHUNK <= WIDTH else LAST)[None, None, :]


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
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
):
    row, pixel, head, valid = items(pixels, FRAMES, HEADS, FRAME_BLOCK, HEAD_BLOCK, PIXEL_BLOCK)
    at = row * row_stride + pixel * token_stride + head * WIDTH

    scores = tl.zeros([HEAD_BLOCK * PIXEL_BLOCK, FRAME_BLOCK, FRAME_BLOCK], tl.float32)
    for start in tl.static_range(0, WIDTH, CHUNK):
        column = columns(start, WIDTH, CHUNK, LAST)
        there = valid & (column < WIDTH)
        queries = tl.load(q + at + column, mask=there, other=0.0)
        keys = tl.load(k + at + column, mask=there, other=0.0)
        scores = product(queries, tl.permute(keys, (0, 2, 1)), scores)
    scores = tl.where(tl.arange(0, FRAME_BLOCK)[None, None, :] < FRAMES, scores * scale, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    p = (p / tl.sum(p, 2)[:, :, None]).to(v.dtype.element_ty)

    at_out = (row * pixels + pixel) * HEADS * WIDTH + head * WIDTH
    for start in tl.static_range(0, WIDTH, CHUNK):
        column = columns(start, WIDTH, CHUNK, LAST)
        there = valid & (column < WIDTH)
        values = tl.load(v + at + column, mask=there, other=0.0)
        tl.store(out + at_out + column, product(p, values).to(out.dtype.element_ty), mask=there)


def forward(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    """q, k, v: ((b frames), s, num_heads * head_dim), of equal strides and unit stride in the last axis."""
    n, s, width = q.shape
    out = q.new_empty(n, s, width)
    programs, sizes = tiles(q, frames, num_heads)
    scale = (width // num_heads) ** -0.5 * launch.LOG2_E
    launch.run(forward_kernel, programs, q, k, v, out, q.stride(0), q.stride(1), s, scale, **sizes)
    return out
