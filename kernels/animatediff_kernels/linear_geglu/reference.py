"""A linear layer and the gated unit of Shazeer (2020, arXiv 2002.05202, Eq. 6), as the maths has it."""

from torch import Tensor

from animatediff_kernels.geglu.reference import geglu_reference


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """value * gelu(gate) of [value | gate] = x weightᵀ + bias. x: (…, width); weight: (2 * inner, width)."""
    return geglu_reference(x @ weight.mT + bias)
