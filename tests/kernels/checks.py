"""When a kernel is right: its error is at most twice torch's own in the same dtype, forward and every gradient."""

from collections.abc import Callable, Sequence

import torch
from animatediff_kernels import use_backend
from torch import Tensor

FLOAT32_NOISE = 1e-6


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: bool) -> list[Tensor]:
    """The output of `function`, then the gradient of every input for one fixed random cotangent."""
    leaves = [x.detach().requires_grad_(grad) for x in inputs]
    out = function(*leaves)
    if not grad:
        return [out]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.device, out.dtype))]


def relative_error(got: Tensor, exact: Tensor) -> float:
    size = exact.norm().item()
    return (got.double() - exact).norm().item() / (size or 1)


def assert_right(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], *, grad: bool = True
) -> None:
    """`function` under "triton" and under "torch" against `reference` in float64."""
    with use_backend("triton"):
        ours = results(function, inputs, grad)
    with use_backend("torch"):
        torchs = results(function, inputs, grad)
    exact = results(reference, [x.double() for x in inputs], grad)
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
        name = f"gradient of input {i - 1}" if i else "output"
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error, bound = relative_error(a, c), 2 * relative_error(b, c) + FLOAT32_NOISE
        assert error <= bound, f"{name}: error {error:.2e}, expected at most {bound:.2e}"
