"""LayerNorm with an encoding of the frame added: the forward kernel. A program holds whole rows in registers."""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks, power_of_2


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    code,
    y,
    rows,
    tokens,
    frames,
    eps,
    WIDTH: tl.constexpr,
    CODE: tl.constexpr,  # whether there is one
    ROW_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    column = tl.arange(0, WIDTH_BLOCK)[None, :]
    there = column < WIDTH
    valid = (row < rows)[:, None] & there
    at = row[:, None] * WIDTH + column
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / WIDTH
    distance = tl.where(there, value - mean[:, None], 0.0)
    variance = tl.sum(distance * distance, 1) / WIDTH
    w = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    result = distance * (1.0 / tl.sqrt(variance + eps))[:, None] * w + b
    if CODE:
        frame = row // tokens % frames
        result += tl.load(code + frame[:, None] * WIDTH + column, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=valid)


def row_block(x: Tensor, numbers: int) -> dict[str, int]:
    """Whole rows per program, of about so many numbers; 128 threads share them."""
    width = power_of_2(x.shape[-1])
    numbers = 65_536 if launch.architecture(x) == "interpreter" else numbers
    return {"WIDTH": x.shape[-1], "ROW_BLOCK": max(1, numbers // width), "WIDTH_BLOCK": width}


def forward(x: Tensor, weight: Tensor, bias: Tensor, code: Tensor | None, eps: float, y: Tensor) -> None:
    """Write y. x and y: (n, s, c), contiguous; code: (frames, c), contiguous, or None."""
    rows, sizes = x.shape[0] * x.shape[1], row_block(x, 4096)
    frames = 1 if code is None else len(code)
    args = (x, weight, bias, x if code is None else code, y, rows, x.shape[1], frames, eps)
    launch.run(forward_kernel, blocks(rows, sizes["ROW_BLOCK"]), *args, CODE=code is not None, **sizes)
