"""The gated unit of Shazeer (2020, arXiv 2002.05202, Eq. 6), as the maths has it."""

import math

import torch
from torch import Tensor


def geglu_reference(x: Tensor) -> Tensor:
    """value * gelu(gate) of x (…, 2 * width), values before gates. Returns (…, width)."""
    value, gate = x.chunk(2, dim=-1)
    return value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
