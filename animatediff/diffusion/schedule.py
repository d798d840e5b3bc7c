"""The noise schedule: betas, spacing of timesteps, and conversions between noise, v and clean data."""

from __future__ import annotations

import torch
from torch import Tensor

from animatediff.model_config import ScheduleConfig
from animatediff.utils import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t = 0 … T - 1 (Ho et al. 2020, arXiv 2006.11239, Eq. 4).

    Attributes:
        alphas_cumprod: abar, float32 (T,) on the CPU.
    Raises: UserError for an unknown beta_schedule, prediction_type or timestep_spacing.
    """

    def __init__(self, config: ScheduleConfig):
        known = {
            "beta_schedule": ("linear", "scaled_linear"),
            "prediction_type": PREDICTIONS,
            "timestep_spacing": SPACINGS,
        }
        for key, choices in known.items():
            if (value := getattr(config, key)) not in choices:
                raise UserError(f"got {key} {value!r}, expected one of {', '.join(choices)}")
        self.config = config
        start, end, steps = config.beta_start, config.beta_end, config.num_train_timesteps
        if config.beta_schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        else:
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        # what comes before t = 0: clean data, or (set_alpha_to_one off) as noisy as t = 0
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]

    def timesteps(self, steps: int) -> Tensor:
        """`steps` timesteps, int64, from noisy to clean.

        Raises: UserError where `steps` is not within 1 … T.
        """
        config, total = self.config, self.config.num_train_timesteps
        if not 1 <= steps <= total:
            raise UserError(f"got {steps} steps, expected 1 to {total}")
        if config.timestep_spacing == "leading":
            grid = torch.arange(steps).flip(0) * (total // steps) + config.steps_offset
        elif config.timestep_spacing == "trailing":
            grid = (torch.arange(total, 0, -total / steps, dtype=torch.float64).round() - 1).long()[:steps]
        else:
            grid = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)
        return grid.clamp(0, total - 1)

    def alpha_at(self, t: Tensor) -> Tensor:
        """abar at timesteps t (any shape); `final_alpha_cumprod` where t is negative. CPU float32."""
        t = t.cpu()
        return torch.where(t >= 0, self.alphas_cumprod[t.clamp(min=0)], self.final_alpha_cumprod)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean x0 (b, …), noise of the same shape and timesteps t (b,)."""
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict of (x0, noise, t), by `prediction_type`."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x0
        signal, sigma = self._scales(t, x0)  # v: Salimans and Ho 2022, arXiv 2202.00512, sec. 4
        return signal * noise - sigma * x0

    def clean_and_noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, noise) that a network's prediction for x at t (b,) amounts to."""
        signal, sigma = self._scales(t, x)
        if self.config.prediction_type == "epsilon":
            return (x - sigma * prediction) / signal, prediction
        if self.config.prediction_type == "sample":
            return prediction, (x - signal * prediction) / sigma
        return signal * x - sigma * prediction, signal * prediction + sigma * x

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha_at(t).to(like.device).reshape(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)
