"""DDIM inversion: from clean data to noise from which DDIM comes back to it."""

from __future__ import annotations

from torch import Tensor

from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.schedule import NoiseSchedule


def invert(denoise: Denoise, x: Tensor, *, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """DDIM without noise, run upwards (Song et al. 2021, arXiv 2010.02502, Eq. 14).

    A step of DDIM takes the noise that is predicted at its noisier end. Upwards that end is what is sought, so the
    prediction is made for its timestep at the latents of the cleaner one: the way back is not exact, but comes closer
    with more steps.

    Args:
        denoise: as for a sampler; without guidance, whose predictions change too much from step to step.
        x: clean latents (b, f, c, h, w).
        timesteps: (steps,), from noisy to clean: those that the sampler will visit.

    Returns:
        Latents of x's shape at timesteps[0].
    """
    abar = float(schedule.final_alpha_cumprod)
    for t, abar_next in zip(timesteps.flip(0), schedule.alpha_at(timesteps).flip(0).tolist(), strict=True):
        batch_t = t.to(x.device).expand(len(x))
        _, noise = schedule.clean_and_noise(denoise(x, batch_t), x, batch_t)
        clean = (x - (1 - abar) ** 0.5 * noise) / abar**0.5
        x = abar_next**0.5 * clean + (1 - abar_next) ** 0.5 * noise
        abar = abar_next
    return x
