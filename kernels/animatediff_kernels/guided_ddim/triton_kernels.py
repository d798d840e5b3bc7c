"""Guidance and one deterministic DDIM step in one pass; the schedule stays on the device, for CUDA graphs."""

import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks

BLOCK = 1024


@triton.jit
def guided_ddim_kernel(x, both, alphas, out, elements, scale, VELOCITY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < elements
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    unconditional = tl.load(both + at, mask=valid, other=0.0).to(tl.float32)
    conditional = tl.load(both + elements + at, mask=valid, other=0.0).to(tl.float32)
    prediction = unconditional + scale * (conditional - unconditional)
    now, after = tl.load(alphas), tl.load(alphas + 1)
    signal, noise = tl.sqrt(now), tl.sqrt(1.0 - now)
    if VELOCITY:
        clean, epsilon = signal * value - noise * prediction, noise * value + signal * prediction
    else:
        clean, epsilon = (value - noise * prediction) / signal, prediction
    result = tl.sqrt(after) * clean + tl.sqrt(1.0 - after) * epsilon
    tl.store(out + at, result.to(out.dtype.element_ty), mask=valid)


def run(x: Tensor, both: Tensor, alphas: Tensor, scale: float, velocity: bool, out: Tensor) -> None:
    """Write out. All contiguous; shapes as in `guided_ddim`; alphas float32."""
    args = (x, both, alphas, out, x.numel(), scale)
    launch.run(guided_ddim_kernel, blocks(x.numel(), BLOCK), *args, VELOCITY=velocity, BLOCK=BLOCK)
