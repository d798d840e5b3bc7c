"""Attention: the backward kernels (FlashAttention-2, Dao 2023, arXiv 2307.08691, Alg. 2, in two passes).

`queries_kernel` owns a tile of queries, walks over the keys and writes dQ and, per query, delta = rowsum(dO O).
`keys_kernel` owns a tile of keys, walks over the queries of one image and writes dK and dV. Where images share keys,
every image writes its own and they are summed afterwards: no atomics, the same result every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.attention.launches import KEY_GRADIENT, QUERY_GRADIENT, pick, tiles
from animatediff_kernels.attention.triton_fwd import below
from animatediff_kernels.launch import blocks


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    out,
    dout,
    log_sum,
    delta,
    dq,
    q_image_stride,
    q_token_stride,
    kv_row_stride,
    kv_token_stride,
    tokens,
    images_per_row,
    scale,
    log2_scale,  # scale * log2(e)
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
    at = (image * tokens + token[:, None]) * HEADS * WIDTH + head * WIDTH
    in_low = valid & (low < WIDTH)
    q_low = tl.load(q + q_at + low, mask=in_low, other=0.0)
    do_low = tl.load(dout + at + low, mask=in_low, other=0.0)
    own = tl.sum(do_low.to(tl.float32) * tl.load(out + at + low, mask=in_low, other=0.0).to(tl.float32), 1)
    sum_low = tl.zeros([QUERY_BLOCK, LOW], tl.float32)
    if TAIL > 0:
        in_tail = valid & (tail < WIDTH)
        q_tail = tl.load(q + q_at + tail, mask=in_tail, other=0.0)
        do_tail = tl.load(dout + at + tail, mask=in_tail, other=0.0)
        own += tl.sum(do_tail.to(tl.float32) * tl.load(out + at + tail, mask=in_tail, other=0.0).to(tl.float32), 1)
        sum_tail = tl.zeros([QUERY_BLOCK, TAIL], tl.float32)
    row_at = (image * HEADS + head) * tokens + token
    tl.store(delta + row_at, own, mask=token < tokens)
    normaliser = tl.load(log_sum + row_at, mask=token < tokens, other=0.0)

    kv_base = image // images_per_row * kv_row_stride + head * WIDTH
    for start in range(0, KEYS, KEY_BLOCK):
        key = start + tl.arange(0, KEY_BLOCK)
        kv_at = kv_base + key[:, None] * kv_token_stride
        there = below(key, KEYS, KEY_BLOCK)[:, None]
        k_low = tl.load(k + kv_at + low, mask=there & (low < WIDTH), other=0.0)
        v_low = tl.load(v + kv_at + low, mask=there & (low < WIDTH), other=0.0)
        scores = tl.dot(q_low, tl.trans(k_low), input_precision="tf32x3")
        dp = tl.dot(do_low, tl.trans(v_low), input_precision="tf32x3")
        if TAIL > 0:
            k_tail = tl.load(k + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
            v_tail = tl.load(v + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), acc=scores, input_precision="tf32x3")
            dp = tl.dot(do_tail, tl.trans(v_tail), acc=dp, input_precision="tf32x3")
        p = tl.exp2(scores * log2_scale - normaliser[:, None])
        if KEYS % KEY_BLOCK != 0:
            p = tl.where((key < KEYS)[None, :], p, 0.0)
        ds = (p * (dp - own[:, None])).to(k_low.dtype)
        sum_low = tl.dot(ds, k_low, acc=sum_low, input_precision="tf32x3")
        if TAIL > 0:
            sum_tail = tl.dot(ds, k_tail, acc=sum_tail, input_precision="tf32x3")

    tl.store(dq + at + low, (sum_low * scale).to(dq.dtype.element_ty), mask=in_low)
    if TAIL > 0:
        tl.store(dq + at + tail, (sum_tail * scale).to(dq.dtype.element_ty), mask=in_tail)


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    dout,
    log_sum,
    delta,
    dk,
    dv,
    q_image_stride,
    q_token_stride,
    kv_row_stride,
    kv_token_stride,
    images_per_row,
    scale,
    log2_scale,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    LOW: tl.constexpr,
    TAIL: tl.constexpr,
):
    pid = tl.program_id(0)
    key_blocks: tl.constexpr = (KEYS + KEY_BLOCK - 1) // KEY_BLOCK
    head = pid // key_blocks % HEADS
    image = (pid // key_blocks // HEADS).to(tl.int64)
    key = pid % key_blocks * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    there = (key < KEYS)[:, None]
    low, tail = tl.arange(0, LOW)[None, :], LOW + tl.arange(0, max(TAIL, 16))[None, :]
    kv_at = image // images_per_row * kv_row_stride + head * WIDTH + key[:, None] * kv_token_stride
    k_low = tl.load(k + kv_at + low, mask=there & (low < WIDTH), other=0.0)
    v_low = tl.load(v + kv_at + low, mask=there & (low < WIDTH), other=0.0)
    dk_low, dv_low = tl.zeros([KEY_BLOCK, LOW], tl.float32), tl.zeros([KEY_BLOCK, LOW], tl.float32)
    if TAIL > 0:
        k_tail = tl.load(k + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
        v_tail = tl.load(v + kv_at + tail, mask=there & (tail < WIDTH), other=0.0)
        dk_tail, dv_tail = tl.zeros([KEY_BLOCK, TAIL], tl.float32), tl.zeros([KEY_BLOCK, TAIL], tl.float32)

    q_base = image * q_image_stride + head * WIDTH
    for start in range(0, TOKENS, QUERY_BLOCK):
        token = start + tl.arange(0, QUERY_BLOCK)
        valid = below(token, TOKENS, QUERY_BLOCK)[:, None]
        q_at = q_base + token[:, None] * q_token_stride
        at = (image * TOKENS + token[:, None]) * HEADS * WIDTH + head * WIDTH
        row_at = (image * HEADS + head) * TOKENS + token
        q_low = tl.load(q + q_at + low, mask=valid & (low < WIDTH), other=0.0)
        do_low = tl.load(dout + at + low, mask=valid & (low < WIDTH), other=0.0)
        scores = tl.dot(k_low, tl.trans(q_low), input_precision="tf32x3")
        dp = tl.dot(v_low, tl.trans(do_low), input_precision="tf32x3")
        if TAIL > 0:
            q_tail = tl.load(q + q_at + tail, mask=valid & (tail < WIDTH), other=0.0)
            do_tail = tl.load(dout + at + tail, mask=valid & (tail < WIDTH), other=0.0)
            scores = tl.dot(k_tail, tl.trans(q_tail), acc=scores, input_precision="tf32x3")
            dp = tl.dot(v_tail, tl.trans(do_tail), acc=dp, input_precision="tf32x3")
        normaliser = tl.load(log_sum + row_at, mask=token < TOKENS, other=float("inf"))  # p = 0 where no query is
        own = tl.load(delta + row_at, mask=token < TOKENS, other=0.0)
        p = tl.exp2(scores * log2_scale - normaliser[None, :])
        ds = (p * (dp - own[None, :])).to(q_low.dtype)
        p = p.to(q_low.dtype)
        dv_low = tl.dot(p, do_low, acc=dv_low, input_precision="tf32x3")
        dk_low = tl.dot(ds, q_low, acc=dk_low, input_precision="tf32x3")
        if TAIL > 0:
            dv_tail = tl.dot(p, do_tail, acc=dv_tail, input_precision="tf32x3")
            dk_tail = tl.dot(ds, q_tail, acc=dk_tail, input_precision="tf32x3")

    kind = dk.dtype.element_ty
    at = (image * KEYS + key[:, None]) * HEADS * WIDTH + head * WIDTH
    tl.store(dv + at + low, dv_low.to(kind), mask=there & (low < WIDTH))
    tl.store(dk + at + low, (dk_low * scale).to(kind), mask=there & (low < WIDTH))
    if TAIL > 0:
        tl.store(dv + at + tail, dv_tail.to(kind), mask=there & (tail < WIDTH))
        tl.store(dk + at + tail, (dk_tail * scale).to(kind), mask=there & (tail < WIDTH))


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, dout: Tensor, num_heads: int, keys_too: bool
) -> list[Tensor]:
    """[dq, dk, dv], or [dq] alone without `keys_too`; contiguous.

    q, k, v as in `forward`, out and log_sum what it returned; dout: contiguous.
    """
    n, s, width = q.shape
    rows, keys, head_dim = k.shape[0], k.shape[1], width // num_heads
    images_per_row, scale = n // rows, head_dim**-0.5
    dq, delta = q.new_empty(n, s, width), torch.empty_like(log_sum)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    scales = (images_per_row, scale, scale * launch.LOG2_E)
    sizes = tiles(pick(QUERY_GRADIENT, q, head_dim), s, keys, head_dim, num_heads)
    programs = n * num_heads * blocks(s, sizes["QUERY_BLOCK"])
    launch.run(queries_kernel, programs, q, k, v, out, dout, log_sum, delta, dq, *strides, s, *scales, **sizes)
    if not keys_too:
        return [dq]
    kind = q.dtype if images_per_row == 1 else torch.float32  # of dk and dv before images are summed
    dk, dv = q.new_empty(n, keys, width, dtype=kind), q.new_empty(n, keys, width, dtype=kind)
    sizes = tiles(pick(KEY_GRADIENT, q, head_dim), s, keys, head_dim, num_heads)
    programs = n * num_heads * blocks(keys, sizes["KEY_BLOCK"])
    launch.run(keys_kernel, programs, q, k, v, dout, log_sum, delta, dk, dv, *strides, *scales, TOKENS=s, **sizes)
    if images_per_row > 1:
        dk, dv = (x.unflatten(0, (rows, images_per_row)).sum(1).to(q.dtype) for x in (dk, dv))
    return [dq, dk, dv]
