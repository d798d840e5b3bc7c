"""Samplers: from noise to data through a denoiser. They know nothing of prompts, guidance or networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.schedule import NoiseSchedule


def ddim(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, Eq. 12), each step `T // steps` timesteps down.

    Args:
        denoise: x (b, f, c, h, w), t (b,) -> prediction, of the schedule's type.
        x: start latents (b, f, c, h, w); pure noise has standard deviation 1.
        timesteps: (steps,), from noisy to clean, as `schedule.timesteps(steps)` gives them.
        eta: 0 deterministic … 1 as noisy as DDPM (Eq. 16).
        noise: draws standard normal noise of x's shape; needed for eta > 0.
        callback: called after every step with its number, timestep and the new x, which it may change in place.
    Returns: clean latents of x's shape.
    """
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs `noise`")
    stride = schedule.config.num_train_timesteps // len(timesteps)
    for step, t in enumerate(timesteps):
        batch_t = t.to(x.device).expand(len(x))
        clean, epsilon = schedule.clean_and_noise(denoise(x, batch_t), x, batch_t)
        if schedule.config.clip_sample:
            clean = clean.clamp(-1, 1)
            alpha = schedule.alpha_at(t)
            epsilon = (x - alpha.sqrt().to(x) * clean) / (1 - alpha).sqrt().to(x)
        alpha, before = schedule.alpha_at(t), schedule.alpha_at(t - stride)
        variance = (1 - before) / (1 - alpha) * (1 - alpha / before)
        sigma = eta * variance.sqrt()
        x = before.sqrt().to(x) * clean + (1 - before - sigma**2).sqrt().to(x) * epsilon
        if eta > 0:
            assert noise is not None
            x = x + sigma.to(x) * noise().to(x)
        if callback is not None:
            callback(step, int(t), x)
    return x
