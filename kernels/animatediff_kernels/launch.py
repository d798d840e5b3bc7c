"""Launching a Triton kernel: how tiles are cut, and what must hold for every launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from animatediff_kernels.dispatch import device_name

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
SMALLEST_TILE = 16  # a side of a matrix instruction


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n."""
    return -(-n // size)


def split_width(width: int) -> tuple[int, int]:
    """A width as two tiles whose sides are powers of two: 40 -> 32 + 16, 80 -> 64 + 16, 160 -> 128 + 32.

    The second is 0 where one tile is no larger than two: 64 -> 64 + 0, 20 -> 32 + 0.
    """
    whole = max(SMALLEST_TILE, power_of_2(width))
    low = whole // 2
    tail = max(SMALLEST_TILE, power_of_2(width - low)) if width > low else 0
    return (low, tail) if low >= SMALLEST_TILE and low + tail < whole else (whole, 0)


def architecture(x: Tensor) -> str:
    """The column of the launch tables for a tensor's device."""
    return device_name(x.device)


def run(kernel: Any, programs: int, *args: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """Launch `kernel` on a grid of one axis (65,535 bounds the others) on the device of its first argument.

    Under the interpreter, which multiplies the bits of bfloat16 numbers and truncates where it should round, bfloat16
    tensors are widened to float32 for the kernel, and what it wrote is rounded by torch.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if args[0].is_cuda:
        with torch.cuda.device(args[0].device):
            kernel[(programs,)](*args, **constants, **options)
        return
    wide = [_widened(a) if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args]
    kernel[(programs,)](*wide, **constants, **options)
    for narrow, copy in zip(args, wide, strict=True):
        if narrow is not copy and 0 not in narrow.stride():  # an expanded tensor is an input
            narrow.data.copy_(copy)  # which autograd does not take for a change of an input


def _widened(x: Tensor) -> Tensor:
    """A float32 copy of x with x's strides."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).float()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
