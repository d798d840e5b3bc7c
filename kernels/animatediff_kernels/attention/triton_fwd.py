"""Attention: the forward kernels.

`flash_kernel` walks over the keys with a running maximum (FlashAttention-2, Dao 2023, arXiv 2307.08691, Alg. 1).
`single_pass_kernel`, for the few keys of a text, holds all of them while it walks over queries. Both cut a head width
of 40 into tiles of 32 and 16 instead of padding it to 64, and both let consecutive images share keys and values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.attention.launches import FORWARD, SINGLE_PASS, pick, tiles
from animatediff_kernels.launch import blocks

MOST_QUERY_TILES = 4  # per program of the single pass


@triton.jit
def below(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE; where blocks divide the size, the compiler is told that it always is."""
    return index < SIZE if SIZE % BLOCK != 0 else tl.zeros_like(index) == 0


@triton.jit
def flash_kernel(
    q,
    k,
    v,
    out,
    log_sum,
    q_image_stride,
    q_token_stride,
    kv_row_stride,
    kv_token_stride,
    tokens,
    images_per_row,
    scale,  # of the scores, with log2(e) in it
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    LOW: tl.constexpr,
    TAIL: tl.constexpr,
):
    pid = tl.program_id(0)
    query_blocks = (tokens + QUERY_BLOCK - 1) // QUERY_BLOCK
    head = pid // query_blocks % HEADS
    image = (pid // query_blocks // HEADS).to(tl.int64)
    token = pid % query_blocks * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    valid = (token < tokens)[:, None]
    low, tail = tl.arange(0, LOW)[None, :], LOW + tl.arange(0, max(TAIL, 16))[None, :]
    q_at = image * q_image_stride + head * WIDTH + token[:, None] * q_token_stride
    q_low = tl.load(q + q_at + low, mask=valid & (low < WIDTH), other=0.0)
    sum_low = tl.zeros([QUERY_BLOCK, LOW], tl.float32)
    if TAIL > 0:
        q_tail = tl.load(q + q_at + tail, mask=valid & (tail < WIDTH), other=0.0)
        sum_tail = tl.zeros([QUERY_BLOCK, TAIL], tl.float32)
    best = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)

    kv_base = image // images_per_row * kv_row_stride + head * WIDTH
    for start in range(0, KEYS, KEY_BLOCK):
        key = start + tl.arange(0, KEY_BLOCK)
        kv_at = kv_base + key[:, None] * kv_token_stride
        there = below(key, KEYS, KEY_BLOCK)[:, None]
        k_low = tl.load(k + kv_at + low, mask=there & (low < WIDTH), other=0.0)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision="tf32x3")
        if TAIL > 0:
            k_tail = tl.load(k + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), acc=scores, input_precision="tf32x3")
        if KEYS % KEY_BLOCK != 0:
            scores = tl.where((key < KEYS)[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - better[:, None])  # one fused instruction before the exponential
        keep = tl.exp2(best - better)
        total = total * keep + tl.sum(p, 1)
        best = better
        v_low = tl.load(v + kv_at + low, mask=there & (low < WIDTH), other=0.0)
        p = p.to(v_low.dtype)
        sum_low = tl.dot(p, v_low, acc=sum_low * keep[:, None], input_precision="tf32x3")
        if TAIL > 0:
            v_tail = tl.load(v + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
            sum_tail = tl.dot(p, v_tail, acc=sum_tail * keep[:, None], input_precision="tf32x3")

    kind = out.dtype.element_ty
    at = (image * tokens + token[:, None]) * HEADS * WIDTH + head * WIDTH
    tl.store(out + at + low, (sum_low / total[:, None]).to(kind), mask=valid & (low < WIDTH))
    if TAIL > 0:
        tl.store(out + at + tail, (sum_tail / total[:, None]).to(kind), mask=valid & (tail < WIDTH))
    tl.store(log_sum + (image * HEADS + head) * tokens + token, best + tl.log2(total), mask=token < tokens)


@triton.jit
def single_pass_kernel(
    q,
    k,
    v,
    out,
    log_sum,
    q_image_stride,
    q_token_stride,
    kv_row_stride,
    kv_token_stride,
    tokens,
    images_per_row,
    scale,  # of the scores, with log2(e) in it
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    LOW: tl.constexpr,
    TAIL: tl.constexpr,
    QUERY_TILES: tl.constexpr,
):
    pid = tl.program_id(0)
    query_groups = (tokens + QUERY_BLOCK * QUERY_TILES - 1) // (QUERY_BLOCK * QUERY_TILES)
    head = pid // query_groups % HEADS
    image = (pid // query_groups // HEADS).to(tl.int64)
    first = pid % query_groups * QUERY_TILES * QUERY_BLOCK
    low, tail = tl.arange(0, LOW)[None, :], LOW + tl.arange(0, max(TAIL, 16))[None, :]
    key = tl.arange(0, KEY_BLOCK)
    there = (key < KEYS)[:, None]
    kv_at = image // images_per_row * kv_row_stride + head * WIDTH + key[:, None] * kv_token_stride
    k_low = tl.load(k + kv_at + low, mask=there & (low < WIDTH), other=0.0)
    v_low = tl.load(v + kv_at + low, mask=there & (low < WIDTH), other=0.0)
    if TAIL > 0:
        k_tail = tl.load(k + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
        v_tail = tl.load(v + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)

    kind = out.dtype.element_ty
    for tile in range(0, QUERY_TILES):
        token = first + tile * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
        valid = (token < tokens)[:, None]
        q_at = image * q_image_stride + head * WIDTH + token[:, None] * q_token_stride
        q_low = tl.load(q + q_at + low, mask=valid & (low < WIDTH), other=0.0)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision="tf32x3")
        if TAIL > 0:
            q_tail = tl.load(q + q_at + tail, mask=valid & (tail < WIDTH), other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), acc=scores, input_precision="tf32x3")
        scores = tl.where((key < KEYS)[None, :], scores * scale, float("-inf"))
        best = tl.max(scores, 1)
        p = tl.exp2(scores - best[:, None])
        total = tl.sum(p, 1)
        p = p.to(v_low.dtype)
        at = (image * tokens + token[:, None]) * HEADS * WIDTH + head * WIDTH
        result = tl.dot(p, v_low, input_precision="tf32x3") / total[:, None]
        tl.store(out + at + low, result.to(kind), mask=valid & (low < WIDTH))
        if TAIL > 0:
            result = tl.dot(p, v_tail, input_precision="tf32x3") / total[:, None]
            tl.store(out + at + tail, result.to(kind), mask=valid & (tail < WIDTH))
        tl.store(log_sum + (image * HEADS + head) * tokens + token, best + tl.log2(total), mask=token < tokens)


def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The output and, for the backward pass, log2 of the sum of exponentials of every row, (n, num_heads, s) float32.

    q: (n, s, width); k, v: (n / r, l, width), of equal strides; all of unit stride in the last axis.
    """
    n, s, width = q.shape
    rows, keys, head_dim = k.shape[0], k.shape[1], width // num_heads
    out = q.new_empty(n, s, width)
    log_sum = q.new_empty(n, num_heads, s, dtype=torch.float32)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    args = (q, k, v, out, log_sum, *strides, s, n // rows, head_dim**-0.5 * launch.LOG2_E)
    row = pick(SINGLE_PASS, q, head_dim, keys)
    if n > rows and row is not None:
        sizes = tiles(row, s, keys, head_dim, num_heads)
        query_tiles = min(MOST_QUERY_TILES, blocks(s, sizes["QUERY_BLOCK"]))
        programs = n * num_heads * blocks(s, sizes["QUERY_BLOCK"] * query_tiles)
        launch.run(single_pass_kernel, programs, *args, QUERY_TILES=query_tiles, **sizes)
    else:
        sizes = tiles(pick(FORWARD, q, head_dim), s, keys, head_dim, num_heads)
        launch.run(flash_kernel, n * num_heads * blocks(s, sizes["QUERY_BLOCK"]), *args, **sizes)
    return out, log_sum
