"""Guidance and one deterministic DDIM step, as the maths has it."""

import torch
from torch import Tensor


def guided_ddim_reference(x: Tensor, both: Tensor, alphas: Tensor, scale: float, velocity: bool) -> Tensor:
    """Ho and Salimans (2022, arXiv 2207.12598, Eq. 6), then Song et al. (2021, arXiv 2010.02502, Eq. 12), eta = 0."""
    kind = torch.promote_types(x.dtype, torch.float32)
    unconditional, conditional = both.to(kind).chunk(2)
    prediction = unconditional + scale * (conditional - unconditional)
    value, alphas = x.to(kind), alphas.to(kind)
    signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
    if velocity:  # v = signal * epsilon - noise * clean (Salimans and Ho 2022, arXiv 2202.00512)
        clean, epsilon = signal[0] * value - noise[0] * prediction, noise[0] * value + signal[0] * prediction
    else:
        clean, epsilon = (value - noise[0] * prediction) / signal[0], prediction
    return (signal[1] * clean + noise[1] * epsilon).to(x.dtype)
