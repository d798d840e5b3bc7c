"""How far rounding may carry a result, by Monte Carlo arithmetic (Parker 1997, UCLA CSD-970002).

The function runs in float64 a few times, and each time every operator's result is moved at random by as much as
rounding moves it in the dtype in question. How far the outcomes spread is the condition of the problem, the lengths of
its sums and the precision in one number per element; no CPU, library or thread count has a say in it.

What one operator is taken to do, with u the unit roundoff of the dtype and u32 that of float32, in which sums are kept:
- an elementwise operator: ±u |y|; a transcendental function ±2⁻²⁰ |y| at least, which is what fast vector code gives;
- a matrix product or convolution of n terms, added one after the other: ±u |y| ± u32 sqrt(n) hypot(|y|, ‖terms‖₂);
- a sum of n terms, added in a tree: ±u |y| ± u32 sqrt(log2(2 n)) hypot(|y|, ‖terms‖₂); a mean and a
  logarithm of a sum, statistics that no kernel rounds to 16 bits, with u32 in place of u.
Everything else is made of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLES = 12
DEVIATIONS = 6  # a normal error is larger once in 5 * 10^8
FUNCTION_UNIT = 2**-20
aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1, aten.convolution: 0}  # -> where the factors begin
SUMS = (aten.sum, aten.mean)
FUNCTIONS = (aten.exp, aten.exp2, aten.log, aten.erf, aten.sigmoid, aten.tanh, aten.sin, aten.cos)
EXACT = (
    *("clone", "copy_", "_to_copy", "cat", "stack", "neg", "relu", "where", "amax", "max", "min", "amin", "index"),
    *("zeros", "ones", "empty", "full", "zero_", "fill_", "new_", "arange", "gather", "embedding", "repeat", "scalar"),
    *("pad", "eq", "ne", "lt", "gt", "le", "ge", "detach", "sign", "abs", "clamp", "slice_backward", "select_backward"),
    *("upsample_nearest", "index_put", "argmax", "triu", "tril", "masked_fill", "_like", "avg_pool", "roll", "flip"),
)
DECOMPOSED = ("softmax", "group_norm", "layer_norm", "var", "gelu", "silu", "convolution_backward", "linear")


class Rounding(TorchDispatchMode):
    """Within it every result of the float64 operators is moved by a random draw of what rounding to `dtype` does."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.unit, self.sum_unit = (torch.finfo(kind).eps / 2 for kind in (dtype, torch.float32))
        self.smallest = torch.finfo(dtype).smallest_normal
        self.generator = generator

    def draw(self, size: Tensor) -> Tensor:
        return size * (2 * torch.rand(size.shape, generator=self.generator, dtype=size.dtype) - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        name = packet._qualified_op_name.removeprefix("aten::")
        if any(name.removeprefix("_").removeprefix("native_").startswith(word) for word in DECOMPOSED):
            if packet is aten.convolution_backward:
                return self.convolution_backward(func, args)
            if packet is aten._softmax:
                return self.softmax(*args[:2])
            with self:
                return decomposition_table[func](*args, **kwargs)
        out = func(*args, **kwargs)
        moved = isinstance(out, Tensor) and out.dtype == torch.float64
        if not moved or func.is_view or any(word in name for word in EXACT):
            return out
        if packet in PRODUCTS:
            a, b = args[PRODUCTS[packet] :][:2]
            convolved = packet is aten.convolution
            terms = (func(a**2, b**2, None, *args[3:]) if convolved else a**2 @ b**2).sqrt()
            return out + self.draw(self.sum(out, terms, b[0].numel() if convolved else a.shape[-1]))
        if packet in SUMS:
            x, length = args[0], args[0].numel() // max(out.numel(), 1)
            terms = aten.sum(x**2, *args[1:], **kwargs).sqrt()
            if packet is aten.mean:
                return out + self.draw(self.sum(out, terms / length, math.log2(2 * length), self.sum_unit))
            return out + self.draw(self.sum(out, terms, math.log2(2 * length)))
        unit = max(self.unit, FUNCTION_UNIT) if packet in FUNCTIONS else self.unit
        unit = self.sum_unit if packet is aten.logsumexp else unit
        return out + self.draw(unit * out.abs() + self.unit * self.smallest)

    def sum(self, y: Tensor, terms: Tensor, length: float, unit: float | None = None) -> Tensor:
        unit = self.unit if unit is None else unit
        return unit * y.abs() + self.sum_unit * math.sqrt(length) * torch.hypot(y, terms)

    def softmax(self, scores: Tensor, dim: int) -> Tensor:
        """As in FlashAttention (Dao et al. 2022, arXiv 2205.14135): the logarithm of the sum is kept, the scores are
        computed again, which moves them by some roundings.
        """
        with self:
            normaliser = scores.logsumexp(dim, keepdim=True)
            again = scores + self.draw(4 * self.sum_unit * scores.abs())
            return (again - normaliser).exp()

    def convolution_backward(self, func: Any, args: tuple) -> list[Tensor | None]:
        grad, x, weight, *others = args
        out, squares = func(*args), func(grad**2, x**2, weight**2, *others)
        lengths = weight.shape[0] * weight[0, 0].numel(), grad[:, 0].numel(), grad[:, 0].numel()
        return [
            y if y is None else y + self.draw(self.sum(y, s.sqrt(), n))
            for y, s, n in zip(out, squares, lengths, strict=True)
        ]


def exact_and_bounds(
    function: Callable[..., Sequence[Tensor]], *inputs: Any, dtype: torch.dtype = torch.float32, samples: int = SAMPLES
) -> list[tuple[Tensor, Tensor]]:
    """Every result of `function` in float64, and how far an implementation in `dtype` may be from it, per element."""
    with sdpa_kernel(SDPBackend.MATH):
        exact = function(*inputs)
        squares = [torch.zeros_like(x) for x in exact]
        for seed in range(samples):
            with Rounding(dtype, torch.Generator().manual_seed(seed)):
                rounded = function(*inputs)
            for total, x, y in zip(squares, rounded, exact, strict=True):
                total += (x - y).square() / samples
    return [(x, DEVIATIONS * _pooled(square).sqrt()) for x, square in zip(exact, squares, strict=True)]


def _pooled(square: Tensor) -> Tensor:
    """Variances of a few samples, steadied by those of the row and of the whole tensor."""
    row = square.mean(-1, keepdim=True) if square.ndim else square
    return square.maximum(row) + square.mean()


def worst(got: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The largest error in units of its bound; infinite where `got` is not finite."""
    if not got.isfinite().all():
        return math.inf
    return ((got.double() - exact).abs() / bound.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
