"""The step of a guided sampler: from the network's two predictions to the next latents."""

from __future__ import annotations

from torch import Tensor

from animatediff_kernels.dispatch import Call, choose
from animatediff_kernels.guided_ddim.op import guided_ddim_op
from animatediff_kernels.guided_ddim.reference import guided_ddim_reference


def guided_ddim(
    x: Tensor,
    both: Tensor,
    alphas: Tensor,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    backend: str | None = None,
) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, Eq. 6) and a DDIM step of eta 0 (arXiv 2010.02502, Eq. 12).

    Args:
        x: latents (b, …).
        both: predictions (2b, …), the unconditional ones first.
        alphas: (2,) float32 on x's device: the cumulative alpha of this timestep and of the next, cleaner one.
        prediction_type: "epsilon" or "v_prediction".
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: the next latents, of x's shape.
    Raises: ValueError for other prediction types or shapes, and where "triton" is asked for and cannot be had.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"got prediction_type={prediction_type!r}, expected epsilon or v_prediction")
    if not (both.shape == (2 * x.shape[0], *x.shape[1:]) and alphas.shape == (2,)):
        raise ValueError(
            f"got x {(*x.shape,)}, both {(*both.shape,)}, alphas {(*alphas.shape,)}, expected (b, …), (2 b, …), (2,)"
        )
    velocity = prediction_type == "v_prediction"
    if choose(Call.of("guided_ddim", x, both, rows=x.numel()), backend).backend == "triton":
        return guided_ddim_op(x, both, alphas, guidance_scale, velocity)
    return guided_ddim_reference(x, both, alphas, guidance_scale, velocity)
