"""Parts of a clip that are given and stay as they are while the rest is sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from animatediff.diffusion.samplers import Callback
from animatediff.diffusion.schedule import NoiseSchedule


def noised(clean: Tensor, noise: Tensor, alpha: float, share: Tensor | float = 1.0) -> Tensor:
    """sqrt(abar) share x_0 + sqrt(1 - abar share²) noise: noised data of which only a share is left, of variance 1.

    Args:
        clean, noise: (b, f, c, h, w).
        alpha: abar, 0 (noise) to 1 (clean).
        share: 0 (none of it) to 1, a tensor of any shape that broadcasts.
    """
    signal = alpha**0.5 * torch.as_tensor(share).to(clean)
    return signal * clean + (1 - signal**2).clamp(min=0).sqrt() * noise


def hold(clean: Tensor, noise: Tensor, held: Tensor, *, schedule: NoiseSchedule, timesteps: Tensor) -> Callback:
    """A sampler's callback that puts the known part back after every step, noised to the level that x is at.

    The replacement of Lugmayr et al. 2022, arXiv 2201.09865, Eq. 8, always with the same noise: what is known then
    moves along the straight path from that noise, as it does under a deterministic sampler. After the last step it is
    `clean`, exactly.

    Args:
        clean: known latents (b, f, c, h, w); any values where nothing is held.
        noise: standard normal, of the same shape.
        held: bool, True where `clean` stays; broadcasts to that shape.
        timesteps: (steps,), those of the sampler.
    """
    levels = [*schedule.alpha_at(timesteps).tolist()[1:], 1.0]

    def put_back(step: int, timestep: int, x: Tensor) -> None:
        x.copy_(torch.where(held, noised(clean, noise, levels[step]), x))

    return put_back
