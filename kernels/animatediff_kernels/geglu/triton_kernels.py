"""GEGLU: forward and backward, one pass over memory each.

With P the normal distribution and p its density: y = v g P(g), dv = dy g P(g), dg = dy v (P(g) + g p(g)).
"""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks, power_of_2


@triton.jit
def geglu_kernel(
    x,
    dy,
    out,  # y, or with GRAD the gradient of x
    rows,
    WIDTH: tl.constexpr,
    GRAD: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    width_blocks: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK
    pid = tl.program_id(0)
    row = (pid // width_blocks).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    column = pid % width_blocks * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)[None, :]
    valid = (row < rows) & (column < WIDTH)
    at = row * (2 * WIDTH) + column
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    gate = tl.load(x + at + WIDTH, mask=valid, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    kind = out.dtype.element_ty
    if GRAD:
        grad = tl.load(dy + row * WIDTH + column, mask=valid, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        tl.store(out + at, (grad * gate * share).to(kind), mask=valid)
        tl.store(out + at + WIDTH, (grad * value * (share + gate * density)).to(kind), mask=valid)
    else:
        tl.store(out + row * WIDTH + column, (value * gate * share).to(kind), mask=valid)


def run(x: Tensor, dy: Tensor, out: Tensor, *, grad: bool) -> None:
    """Write y, or the gradient of x. All contiguous; x: (…, 2 * width)."""
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    wide = min(power_of_2(width), 256)
    high = 256 if launch.architecture(x) == "interpreter" else max(1, 1024 // wide)
    sizes = {"WIDTH": width, "ROW_BLOCK": high, "WIDTH_BLOCK": wide}
    launch.run(geglu_kernel, blocks(rows, high) * blocks(width, wide), x, dy, out, rows, GRAD=grad, **sizes)
