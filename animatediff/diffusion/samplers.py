"""Samplers: from noise to data through a denoiser. They know nothing of prompts, guidance or networks.

All work on latents x = sqrt(abar) x_0 + sqrt(1 - abar) noise, whatever space their papers are written in, so each can
go on from where another stopped. They visit the timesteps they are given, one after the other, and end at
`schedule.final_alpha_cumprod`: clean data, unless the schedule says otherwise. Their arguments are those of `Sampler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.utils import UserError, unknown_key

Noise = Callable[[], Tensor]
Callback = Callable[[int, int, Tensor], None]
LCM_SIGMA_DATA, LCM_TIMESTEP_SCALE = 0.5, 10.0  # of the boundary condition that consistency models are distilled with

ADAMS_BASHFORTH = {  # weights by number of predictions, the newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class Sampler(Protocol):
    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        *,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            denoise: x (b, f, c, h, w), t (b,) -> prediction, of the schedule's type.
            x: start latents (b, f, c, h, w); pure noise has standard deviation 1.
            timesteps: (steps,), from noisy to clean, as `schedule.timesteps(steps)` gives them; may be fractional.
            noise: draws standard normal noise of x's shape; only samplers that add noise need it.
            callback: called after every step with its number, timestep and the new x, which it may change in place.

        Returns:
            Clean latents of x's shape.
        """
        ...


def ddim(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, Eq. 12); eta: 0 deterministic … 1 as noisy as DDPM (Eq. 16)."""
    for step, t, here, after in _levels(schedule, timesteps):
        clean, epsilon = _predict(denoise, x, t, schedule)
        sigma = eta * ((1 - after) / (1 - here) * (1 - here / after)) ** 0.5
        x = after**0.5 * clean + max(1 - after - sigma**2, 0) ** 0.5 * epsilon
        if sigma > 0:
            x = x + sigma * _draw(noise, x)
        _report(callback, step, t, x)
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on dx/dsigma = noise, sigma² = (1 - abar)/abar (Karras et al. 2022, arXiv 2206.00364, Alg. 1).

    Scaled by sqrt(abar), a step sigma -> sigma' is clean' sqrt(abar') + noise sqrt(1 - abar'): DDIM without noise.
    """
    return ddim(denoise, x, schedule=schedule, timesteps=timesteps, callback=callback)


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method down to sigma_down, then noise up to sigma', sigma_up² = sigma'² (sigma² - sigma'²) / sigma².

    These are the posterior's variances, the ones of DDPM: DDIM with eta = 1.
    """
    return ddim(denoise, x, schedule=schedule, timesteps=timesteps, eta=1.0, noise=noise, callback=callback)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, arXiv 2211.01095, Alg. 2).

    lambda = log(sqrt(abar) / sqrt(1 - abar)); the clean data is extrapolated along it from the last two predictions.
    The last step has nowhere to extrapolate to, lambda being infinite at clean data, and is of first order.
    """
    previous, h_before = None, 0.0
    for step, t, here, after in _levels(schedule, timesteps):
        clean, _ = _predict(denoise, x, t, schedule)
        h = _half_log_snr(after) - _half_log_snr(here)
        middle = clean if previous is None or after == 1 else clean + h / (2 * h_before) * (clean - previous)
        shrink = ((1 - after) / (1 - here)) ** 0.5
        x = shrink * x + (after**0.5 - shrink * here**0.5) * middle
        previous, h_before = clean, h
        _report(callback, step, t, x)
    return x


def pndm(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778, Eq. 9 and 12), as Stable Diffusion runs it.

    The noise is extrapolated from up to four predictions (Adams and Bashforth). Instead of the paper's Runge-Kutta
    start, the first step is repeated with the mean of the noise at its two ends: one more call of the denoiser.

    Raises:
        UserError: the schedule has no signal left at the first timestep (zero terminal SNR).
    """
    history: list[Tensor] = []
    for step, t, here, after in _levels(schedule, timesteps):
        if here == 0:
            raise UserError("got zero terminal SNR, from which pndm cannot start: use ddim, euler or dpmpp_2m")
        history = [*history[-3:], _predict(denoise, x, t, schedule)[1]]
        weighted = (w * e for w, e in zip(ADAMS_BASHFORTH[len(history)], reversed(history), strict=True))
        epsilon = sum(weighted, start=torch.zeros_like(x))
        if step == 0 and len(timesteps) > 1:
            epsilon = (epsilon + _predict(denoise, _transfer(x, epsilon, here, after), timesteps[1], schedule)[1]) / 2
        x = _transfer(x, epsilon, here, after)
        _report(callback, step, t, x)
    return x


def lcm(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep consistency sampling for latent consistency models (Luo et al. 2023, arXiv 2310.04378, Alg. 3).

    Every step jumps to clean data, c_skip x + c_out x_0 (Eq. 9), and back to the next timestep with fresh noise.
    """
    for step, t, _, after in _levels(schedule, timesteps):
        clean, _ = _predict(denoise, x, t, schedule)
        scaled = float(t) * LCM_TIMESTEP_SCALE
        norm = (scaled**2 + LCM_SIGMA_DATA**2) ** 0.5
        x = (LCM_SIGMA_DATA / norm) ** 2 * x + scaled / norm * clean
        if after < 1:
            x = after**0.5 * x + (1 - after) ** 0.5 * _draw(noise, x)
        _report(callback, step, t, x)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "pndm": pndm,
    "lcm": lcm,
}
OWN_SPACING = {"lcm": "lcm"}  # the timestep_spacing that a sampler needs where nothing else is asked for


def find_sampler(name: str, *, eta: float = 0.0) -> Sampler:
    """The sampler of a name; `eta` is DDIM's.

    Raises:
        UserError: no such sampler, or an eta for one that has none.
    """
    if name not in SAMPLERS:
        raise UserError(f"{unknown_key(name, list(SAMPLERS), what='sampler')} (all: {', '.join(SAMPLERS)})")
    if not eta:
        return SAMPLERS[name]
    if name != "ddim":
        raise UserError(f"got eta {eta:g} with the sampler {name}, expected 0: only ddim has an eta")
    return partial(ddim, eta=eta)


# ---- what the samplers share ----------------------------------------------------------------------------------


def _levels(schedule: NoiseSchedule, timesteps: Tensor) -> Iterator[tuple[int, Tensor, float, float]]:
    """For every step its number, its timestep, abar there, and abar at the next."""
    here = schedule.alpha_at(timesteps).tolist()
    return zip(range(len(here)), timesteps, here, [*here[1:], float(schedule.final_alpha_cumprod)], strict=True)


def _predict(denoise: Denoise, x: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(x_0, noise) at one timestep, the noise being what clipped x_0 leaves where the schedule clips."""
    batch_t = t.to(x.device).expand(len(x))
    clean, epsilon = schedule.clean_and_noise(denoise(x, batch_t), x, batch_t)
    if schedule.config.clip_sample:
        alpha = float(schedule.alpha_at(t))
        clean = clean.clamp(-1, 1)
        epsilon = (x - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    return clean, epsilon


def _transfer(x: Tensor, epsilon: Tensor, here: float, after: float) -> Tensor:
    """x at another noise level, if its noise is `epsilon`."""
    return (after / here) ** 0.5 * (x - (1 - here) ** 0.5 * epsilon) + (1 - after) ** 0.5 * epsilon


def _half_log_snr(alpha: float) -> float:
    return math.log(alpha / (1 - alpha)) / 2 if 0 < alpha < 1 else math.copysign(math.inf, alpha - 0.5)


def _draw(noise: Noise | None, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("this sampler adds noise: give `noise`")
    return noise().to(x)


def _report(callback: Callback | None, step: int, t: Tensor, x: Tensor) -> None:
    if callback is not None:
        callback(step, int(t), x)
