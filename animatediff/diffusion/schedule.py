"""The noise schedule: betas, spacing of timesteps, and conversions between noise, v and clean data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff.config.networks import ScheduleConfig
from animatediff.utils import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace", "karras", "lcm")
MOST_TIMESTEPS = 100_000
KARRAS_RHO = 7.0


class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, t = 0 … T - 1 (Ho et al. 2020, arXiv 2006.11239, Eq. 4).

    Timesteps may be fractional: between two, log(sigma), sigma² = (1 - abar)/abar, is linear in t.

    Attributes:
        alphas_cumprod: abar, float32 (T,) on the CPU.
    Raises: UserError for an unknown beta_schedule, prediction_type or timestep_spacing, for numbers out of range, for
        betas that leave no noise or no signal, and for zero terminal SNR where noise is predicted.
    """

    def __init__(self, config: ScheduleConfig):
        _check(config)
        self.config = config
        start, end, steps = config.beta_start, config.beta_end, config.num_train_timesteps
        if config.beta_schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        else:
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        first, last = self.alphas_cumprod[[0, -1]].tolist()
        if first == 1 or last == 0:
            raise UserError(
                f"got betas of {start:g} to {end:g} over {steps} timesteps, which leave no "
                f"{'noise at the first' if first == 1 else 'signal at the last'}: SD 1.5 has 0.00085 to 0.012 over 1000"
            )
        if config.rescale_betas_zero_snr:
            if config.prediction_type == "epsilon":
                raise UserError(
                    "got rescale_betas_zero_snr with prediction_type epsilon, expected v_prediction or sample: pure "
                    "noise does not tell what the clean data is"
                )
            self.alphas_cumprod = rescale_zero_snr(self.alphas_cumprod)
        # what comes before t = 0: clean data, or (set_alpha_to_one off) as noisy as t = 0
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]

    @property
    def sigmas(self) -> Tensor:
        """sqrt((1 - abar)/abar) of all timesteps, float64 (T,); infinite at the last with zero terminal SNR."""
        alphas = self.alphas_cumprod.double()
        return ((1 - alphas) / alphas).sqrt()

    def timesteps(self, steps: int) -> Tensor:
        """`steps` timesteps from noisy to clean: int64, or float32 with karras spacing.

        leading, trailing and linspace: Lin et al. 2023, arXiv 2305.08891, Table 2. A step leads to the next timestep;
        diffusers' DDIM instead goes T // steps down, somewhere else with linspace, and with trailing where `steps` does
        not divide T. karras: Karras et al. 2022, arXiv 2206.00364, Eq. 5, at the fractional timesteps that have these
        sigmas (diffusers rounds what it tells the network). lcm: evenly from the `lcm_timesteps` that the model was
        distilled on, from T - 1.

        Raises:
            UserError: more or less steps than there are timesteps.
        """
        config, total = self.config, self.config.num_train_timesteps
        most = min(config.lcm_timesteps, total) if config.timestep_spacing == "lcm" else total
        if not 1 <= steps <= most:
            raise UserError(f"got {steps} steps, expected 1 to {most}")
        if config.timestep_spacing == "karras":
            return self._karras(steps)
        if config.timestep_spacing == "leading":
            grid = torch.arange(steps).flip(0) * (total // steps) + config.steps_offset
        elif config.timestep_spacing == "trailing":
            grid = (torch.arange(total, 0, -total / steps, dtype=torch.float64).round() - 1).long()[:steps]
        elif config.timestep_spacing == "linspace":
            grid = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)
        else:
            grid = (most - torch.arange(steps) * most // steps) * (total // most) - 1
        return grid.clamp(0, total - 1)

    def _karras(self, steps: int) -> Tensor:
        low, high = self.sigmas[[0, -1]] ** (1 / KARRAS_RHO)
        if high.isinf():
            raise UserError("got karras spacing with zero terminal SNR, whose largest sigma is infinite: use trailing")
        return self.timesteps_of((high + torch.linspace(0, 1, steps, dtype=torch.float64) * (low - high)) ** KARRAS_RHO)

    def timesteps_of(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        """The timesteps, float32 (n,), with these noise levels sigma = sqrt((1 - abar)/abar); inverts `alpha_at`.

        Raises:
            UserError: a sigma that no timestep has.
        """
        known, wanted = self.sigmas, torch.as_tensor(sigmas, dtype=torch.float64)
        low, high = float(known[0]), float(known[-1])
        if outside := [s for s in wanted.tolist() if not low * (1 - 1e-6) <= s <= high * (1 + 1e-6)]:
            raise UserError(
                f"got sigma {outside[0]:g}, expected {low:.4g} to {high:.4g}, as the noise schedule has them"
            )
        above = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        below = above - 1
        part = (wanted / known[below]).log() / (known[above] / known[below]).log()
        return (below + part.nan_to_num(1)).clamp(0, len(known) - 1).float()

    def custom_timesteps(self, values: Sequence[float]) -> Tensor:
        """Timesteps (n,) of a caller's choice, int64 where all are whole.

        Raises:
            UserError: none, one outside 0 … T - 1, or one that is not below the one before.
        """
        most = self.config.num_train_timesteps - 1
        falling = all(a > b for a, b in zip(values, values[1:], strict=False))
        if not values or not falling or not 0 <= values[-1] <= values[0] <= most:
            listed = ", ".join(f"{value:g}" for value in values)
            raise UserError(f"got timesteps [{listed}], expected falling numbers from at most {most} to at least 0")
        whole = all(float(value).is_integer() for value in values)
        return torch.tensor(values).long() if whole else torch.tensor(values, dtype=torch.float32)

    def alpha_at(self, t: Tensor) -> Tensor:
        """abar at timesteps t (any shape); `final_alpha_cumprod` where t is negative. CPU float32."""
        t = t.cpu()
        below = t.floor().long().clamp(min=0) if t.is_floating_point() else t.clamp(min=0)
        alphas = self.alphas_cumprod[below]
        if t.is_floating_point():
            logs = self.sigmas.log()
            between = logs[below].lerp(logs[(below + 1).clamp(max=len(logs) - 1)], (t - below).double())
            alphas = torch.where(t > below, torch.sigmoid(-2 * between).float(), alphas)
        return torch.where(t >= 0, alphas, self.final_alpha_cumprod)

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


def _check(config: ScheduleConfig) -> None:
    known = {"beta_schedule": ("linear", "scaled_linear"), "prediction_type": PREDICTIONS, "timestep_spacing": SPACINGS}
    for key, choices in known.items():
        if (value := getattr(config, key)) not in choices:
            raise UserError(f"got {key} {value!r}, expected one of {', '.join(choices)}")
    start, end, total = config.beta_start, config.beta_end, config.num_train_timesteps
    if not 0 < start <= end < 1:
        raise UserError(
            f"got beta_start {start!r:.20} and beta_end {end!r:.20}, expected 0 < beta_start <= beta_end < 1"
        )
    if not 2 <= total <= MOST_TIMESTEPS:
        raise UserError(f"got num_train_timesteps {total!r:.20}, expected 2 to {MOST_TIMESTEPS}: SD 1.5 has 1000")
    if not 0 <= config.steps_offset < total:
        raise UserError(f"got steps_offset {config.steps_offset!r:.20}, expected 0 to {total - 1}: SD 1.5 has 1")


def step_of(timesteps: Tensor, t: Tensor) -> int:
    """Which of a sampler's timesteps (steps,) is nearest to t (b,), one for the whole batch."""
    return int((timesteps.cpu().double() - float(t[0])).abs().argmin())


def rescale_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """abar made 0 at the last timestep and left as it is at the first (Lin et al. 2023, arXiv 2305.08891, Alg. 1)."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
