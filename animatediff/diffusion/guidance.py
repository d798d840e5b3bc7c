"""Guidance: classifier-free (Ho and Salimans 2022, arXiv 2207.12598), perturbed-attention, and rescaling."""

from __future__ import annotations

from collections.abc import Callable

from einops import repeat
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # x (b, f, c, h, w), t (b,) -> prediction of x's shape


def guide(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """e_u + scale * (e_c - e_u), of any shape (Eq. 6 with scale = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Guided predictions (b, …) with the spread of the conditional ones, clip by clip (arXiv 2305.08891, Eq. 15, 16).

    amount: 0 leaves the guided prediction as it is, 1 gives it all of the other's standard deviation; 0.7 in the paper.
    """
    axes = tuple(range(1, guided.ndim))
    std, guided_std = (x.std(axes, keepdim=True) for x in (conditional, guided))
    return guided * (amount * std / guided_std + (1 - amount))


def classifier_free_guidance(
    denoise: Denoise,
    scale: float,
    *,
    factor: Callable[[Tensor, Tensor], Tensor] | None = None,
    perturbed_scale: float = 0.0,
    rescaled: float = 0.0,
) -> Denoise:
    """Guide a denoiser that takes all parts in one batch: unconditional, conditional, perturbed.

    Args:
        denoise: called with x and t repeated, (n b, f, c, h, w) and (n b,); predicts the parts in this order. There is
            an unconditional one where `scale` is above 1, and a perturbed one where `perturbed_scale` is not 0.
        scale: 1 is the conditional prediction.
        factor: of the scale: told x and t, it gives a tensor to multiply predictions with.
        perturbed_scale: of perturbed-attention guidance (arXiv 2403.17377, Eq. 15), which adds
            scale * (conditional - perturbed); the paper's is 3. What is perturbed is the spatial self-attention; motion
            modules attend as ever.
        rescaled: amount of `rescale`.

    Returns:
        A denoiser of x (b, f, c, h, w) and t (b,).
    """
    parts = 1 + (scale > 1) + (perturbed_scale != 0)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        all_parts = denoise(repeat(x, "b ... -> (n b) ...", n=parts), repeat(t, "b -> (n b)", n=parts))
        first, *others = all_parts.chunk(parts)
        conditional = out = others[0] if scale > 1 else first
        if scale > 1:
            out = guide(first, conditional, scale if factor is None else scale * factor(x, t))
        if perturbed_scale:
            out = out + perturbed_scale * (conditional - others[-1])
        return rescale(out, conditional, rescaled) if rescaled else out

    return guided
