"""LayerNorm: the backward kernel.

With n = (x - mean) rstd and g = dy w: dx = rstd (g - mean(g) - n mean(g n)), dw = sum dy n, db = sum dy. Mean and
deviation are computed again from the row, which is in registers anyway. Every program sums its own rows' share of dw
and db; torch adds the shares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks
from animatediff_kernels.layer_norm.triton_fwd import row_block

STEPS = 16  # tiles of rows per program


@triton.jit
def backward_kernel(
    x,
    dy,
    weight,
    dx,
    weight_grads,
    bias_grads,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH_BLOCK)
    there = (column < WIDTH)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    weight_grad, bias_grad = tl.zeros([WIDTH_BLOCK], tl.float32), tl.zeros([WIDTH_BLOCK], tl.float32)
    for step in range(0, STEPS):
        row = (pid * STEPS + step) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        valid = (row < rows)[:, None] & there
        at = row[:, None] * WIDTH + column[None, :]
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=valid, other=0.0).to(tl.float32)
        distance = tl.where(there, value - (tl.sum(value, 1) / WIDTH)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(distance * distance, 1) / WIDTH + eps)
        rstd = tl.where(row < rows, rstd, 0.0)  # an eps of 0 would make it infinite, and 0 * inf is NaN
        normalised = distance * rstd[:, None]
        g = grad * w
        direct, through = tl.sum(g, 1) / WIDTH, tl.sum(g * normalised, 1) / WIDTH
        result = rstd[:, None] * (g - direct[:, None] - normalised * through[:, None])
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=valid)
        weight_grad += tl.sum(grad * normalised, 0)
        bias_grad += tl.sum(grad, 0)
    tl.store(weight_grads + pid * WIDTH + column, weight_grad, mask=column < WIDTH)
    tl.store(bias_grads + pid * WIDTH + column, bias_grad, mask=column < WIDTH)


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx; return the gradients of weight and bias, (c,) float32. dy, x, dx: (n, s, c), contiguous."""
    rows, sizes = x.shape[0] * x.shape[1], row_block(x, 2048)
    programs = blocks(rows, sizes["ROW_BLOCK"] * STEPS)
    weight_grads, bias_grads = x.new_empty(2, programs, x.shape[-1], dtype=torch.float32)
    launch.run(backward_kernel, programs, x, dy, weight, dx, weight_grads, bias_grads, rows, eps, STEPS=STEPS, **sizes)
    return weight_grads.sum(0), bias_grads.sum(0)
