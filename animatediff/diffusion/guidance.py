"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

from einops import repeat
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # x (b, f, c, h, w), t (b,) -> prediction of x's shape


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """e_u + scale * (e_c - e_u), of any shape (Eq. 6 with scale = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def classifier_free_guidance(denoise: Denoise, scale: float) -> Denoise:
    """Guide a denoiser that takes both halves in one batch.

    Args:
        denoise: called with x and t repeated, (2b, f, c, h, w) and (2b,); predicts the unconditional half first.
        scale: 1 is the conditional prediction, 0 the unconditional one.

    Returns:
        A denoiser of x (b, f, c, h, w) and t (b,).
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        both = denoise(repeat(x, "b ... -> (two b) ...", two=2), repeat(t, "b -> (two b)", two=2))
        return guide(*both.chunk(2), scale)

    return guided
