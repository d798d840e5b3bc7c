"""When a kernel is right: every number is within what rounding in its dtype can do, the output and every gradient."""

from collections.abc import Callable, Sequence

import pytest
import torch
from animatediff_kernels import use_backend
from torch import Tensor

from tests.rounding import exact_and_bounds, worst

DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.float16, torch.bfloat16))],
    ids=lambda t: str(t)[6:],
)


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: bool, dtype: torch.dtype) -> list[Tensor]:
    """The output of `function`, then the gradient of every input for one fixed random cotangent that `dtype` holds."""
    leaves = [x.detach().requires_grad_(grad) for x in inputs]
    out = function(*leaves)
    if not grad:
        return [out]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def errors(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], *, grad: bool = True
) -> list[float]:
    """Of the output and of every gradient: the largest error in units of what rounding can do (`tests/rounding.py`)."""
    dtype = inputs[0].dtype
    allowed = exact_and_bounds(
        lambda *inputs: results(reference, inputs, grad, dtype), *[x.double() for x in inputs], dtype=dtype
    )
    got = results(function, inputs, grad, dtype)
    assert all(x.dtype == dtype for x in got)
    return [worst(x, exact, bound) for x, (exact, bound) in zip(got, allowed, strict=True)]


def assert_right(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], *, grad: bool = True
) -> None:
    """`function` under "triton" against `reference` in float64."""
    with use_backend("triton"):
        found = errors(function, reference, inputs, grad=grad)
    assert max(found) <= 1, f"error / bound of the output and the gradients: {found}"
