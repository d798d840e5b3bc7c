"""A linear layer whose values are gated before they are written: the tensor of twice the width is never in memory.

A program multiplies a tile of tokens by two tiles of weights, those of its values and those of their gates. Their rows
alternate, so that one product computes both and a value and its gate end up in the registers of one thread.
"""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks
from animatediff_kernels.linear_geglu.launches import tiles


@triton.jit
def linear_geglu_kernel(
    x,
    weight,
    bias,
    y,
    rows,
    row_stride,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    pid = tl.program_id(0)
    column_blocks: tl.constexpr = (INNER + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    in_group: tl.constexpr = NEIGHBOURS * column_blocks
    first = pid // in_group * NEIGHBOURS
    high = tl.minimum((rows + ROW_BLOCK - 1) // ROW_BLOCK - first, NEIGHBOURS)
    row = (first + pid % in_group % high).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = pid % in_group // high * COLUMN_BLOCK
    pair = tl.arange(0, 2 * COLUMN_BLOCK)  # value, gate, value, gate, …
    weight_row = tl.minimum(column + pair // 2, INNER - 1) + pair % 2 * INNER
    depth = tl.arange(0, DEPTH)
    x_at = x + tl.minimum(row, rows - 1)[:, None] * row_stride + depth[None, :]
    weight_at = weight + weight_row[None, :] * WIDTH + depth[:, None]
    product = tl.zeros([ROW_BLOCK, 2 * COLUMN_BLOCK], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        if WIDTH % DEPTH == 0:
            a, b = tl.load(x_at + start), tl.load(weight_at + start)
        else:
            there = depth < WIDTH - start
            a = tl.load(x_at + start, mask=there[None, :], other=0.0)
            b = tl.load(weight_at + start, mask=there[:, None], other=0.0)
        product = tl.dot(a, b, acc=product, input_precision="tf32x3")
    product += tl.load(bias + weight_row).to(tl.float32)[None, :]
    value, gate = tl.split(tl.reshape(product, [ROW_BLOCK, COLUMN_BLOCK, 2]))
    result = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    column += tl.arange(0, COLUMN_BLOCK)
    valid = (row < rows)[:, None] & (column < INNER)[None, :]
    tl.store(y + row[:, None] * INNER + column[None, :], result.to(y.dtype.element_ty), mask=valid)


def forward(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
    """Write y (rows, inner). x: (rows, width), of unit stride in the last axis; all others contiguous."""
    rows, inner = y.shape
    sizes = tiles(x, rows, inner)
    programs = blocks(rows, sizes["ROW_BLOCK"]) * blocks(inner, sizes["COLUMN_BLOCK"])
    launch.run(linear_geglu_kernel, programs, x, weight, bias, y, rows, x.stride(0), **sizes)
