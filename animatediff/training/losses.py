"""The denoising loss and its two common variants."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.config.settings import Float, opt, options
from animatediff.diffusion.schedule import NoiseSchedule

MAX_FACTOR = 1e9  # of numbers that are multiplied with float32 ones
Denoise = Callable[[Tensor, Tensor], Tensor]  # x (b, f, c, h, w), t (b,) -> prediction


@options
class LossConfig:
    """Variants of the mean squared error; 0 is off."""

    min_snr_gamma: Float = opt(
        0.0, "limits the weight of hardly noised clips; 5 in Hang et al. 2023, arXiv 2303.09556", ge=0, le=MAX_FACTOR
    )
    noise_offset: Float = opt(
        0.0,
        "of a noise that all pixels of a clip share: 0.1 lets dark and light be learnt",
        ge=0,
        le=MAX_FACTOR,
    )


MEAN_SQUARE = LossConfig()


def denoising_loss(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    generator: torch.Generator,
    config: LossConfig = MEAN_SQUARE,
) -> Tensor:
    """Mean squared error of the network's prediction (Ho et al. 2020, Eq. 14), one timestep per clip.

    Args:
        denoise: the network with all it is told beside x and t.
        schedule: the noise, and what is predicted.
        x0: clean scaled latents (b, f, c, h, w), on the network's device.
        t: timesteps (b,), on the CPU.
        generator: of the CPU, where all noise is drawn.
    """
    noise = torch.randn(x0.shape, generator=generator)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(len(x0), 1, x0.shape[2], 1, 1, generator=generator)
    noise = noise.to(x0.device)
    prediction = denoise(schedule.add_noise(x0, noise, t), t.to(x0.device)).float()
    target = schedule.target(x0, noise, t)
    if not config.min_snr_gamma:
        return F.mse_loss(prediction, target)
    squares = (prediction - target).square().flatten(1).mean(dim=1)
    return (min_snr_weights(schedule, t, config.min_snr_gamma).to(squares) * squares).mean()


def min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """Weights (b,) that count each clip's error of x0 min(SNR, gamma) times (arXiv 2303.09556, Eq. 7 and sec. 3.4)."""
    alpha = schedule.alpha_at(t)
    snr = alpha / (1 - alpha)
    limited = snr.clamp(max=gamma)
    return {"epsilon": limited / snr, "v_prediction": limited / (snr + 1), "sample": limited}[
        schedule.config.prediction_type
    ]
