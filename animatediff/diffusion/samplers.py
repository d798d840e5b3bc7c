"""Samplers: from noise to data through a denoiser. They know nothing of prompts, guidance or networks.

All work on latents x = sqrt(abar) x_0 + sqrt(1 - abar) noise, whatever space their papers are written in, so each can
go on from where another stopped. A sampler is a function of x and of the `Steps` to take: `x = sampler(x, steps)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.utils import UserError, unknown_key

Callback = Callable[[int, int, Tensor], None]
LCM_SIGMA_DATA, LCM_TIMESTEP_SCALE = 0.5, 10.0  # of the boundary condition that consistency models are distilled with
ADAMS_BASHFORTH = {  # weights by number of predictions, the newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class Steps:
    """The steps of a sampler, and all that it may ask for.

    They visit the timesteps one after the other and end at `schedule.final_alpha_cumprod`: clean data, unless the
    schedule says otherwise.

    Attributes:
        denoise: x (b, f, c, h, w), t (b,) -> prediction of x's shape and of the schedule's type.
        schedule: what the denoiser was trained with.
        timesteps: (steps,), from noisy to clean, as `schedule.timesteps(steps)` gives them; may be fractional.
        noise: draws standard normal noise of x's shape; only samplers that add noise need it.
        callback: called after every step with its number, timestep and the new x, which it may change in place.
        estimated: called with every x_0 (b, f, c, h, w) that is predicted, for previews.
    """

    denoise: Denoise
    schedule: NoiseSchedule
    timesteps: Tensor
    noise: Callable[[], Tensor] | None = None
    callback: Callback | None = None
    estimated: Callable[[Tensor], None] | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, float, float]]:
        """For every step its number, its timestep, abar there, and abar at the next."""
        abar = self.schedule.alpha_at(self.timesteps).tolist()
        abar_next = [*abar[1:], float(self.schedule.final_alpha_cumprod)]
        return zip(range(len(abar)), self.timesteps, abar, abar_next, strict=True)

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, noise) that are predicted for x at one timestep.

        Where the schedule has `clip_sample`, x_0 is held within [-1, 1] and the noise stays as predicted, as in the
        official code's DDIM; a sampler that works with the noise alone (pndm) is not changed by it.
        """
        batch_t = t.to(x.device).expand(len(x))
        clean, epsilon = self.schedule.clean_and_noise(self.denoise(x, batch_t), x, batch_t)
        clean = clean.clamp(-1, 1) if self.schedule.config.clip_sample else clean
        if self.estimated is not None:
            self.estimated(clean)
        return clean, epsilon

    def draw(self, x: Tensor) -> Tensor:
        """Fresh noise of x's type and device."""
        if self.noise is None:
            raise ValueError("this sampler adds noise: give `noise`")
        return self.noise().to(x)

    def report(self, step: int, x: Tensor) -> None:
        """Tell the callback that a step is done."""
        if self.callback is not None:
            self.callback(step, int(self.timesteps[step]), x)


Sampler = Callable[[Tensor, Steps], Tensor]  # start latents (b, f, c, h, w), pure noise having std 1 -> clean latents


def ddim(x: Tensor, steps: Steps, *, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, Eq. 12); eta: 0 deterministic … 1 as noisy as DDPM (Eq. 16)."""
    for step, t, abar, abar_next in steps:
        clean, epsilon = steps.predict(x, t)
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * clean + max(1 - abar_next - sigma**2, 0) ** 0.5 * epsilon
        if sigma > 0:
            x = x + sigma * steps.draw(x)
        steps.report(step, x)
    return x


def dpmpp_2m(x: Tensor, steps: Steps) -> Tensor:
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, arXiv 2211.01095, Alg. 2).

    lambda = log(sqrt(abar) / sqrt(1 - abar)); the clean data is extrapolated along it from the last two predictions.
    The last step has nowhere to extrapolate to, lambda being infinite at clean data, and is of first order.
    """
    previous, h_previous = x, 0.0  # h is 0 where two timesteps are the same, as of 1000 steps with an offset
    for step, t, abar, abar_next in steps:
        clean, _ = steps.predict(x, t)
        h = _half_log_snr(abar_next) - _half_log_snr(abar)
        middle = clean if not h_previous or abar_next == 1 else clean + h / (2 * h_previous) * (clean - previous)
        shrink = ((1 - abar_next) / (1 - abar)) ** 0.5
        x = shrink * x + (abar_next**0.5 - shrink * abar**0.5) * middle
        previous, h_previous = clean, h
        steps.report(step, x)
    return x


def pndm(x: Tensor, steps: Steps) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778, Eq. 9 and 12), as Stable Diffusion runs it.

    The noise is extrapolated from up to four predictions (Adams and Bashforth). Instead of the paper's Runge-Kutta
    start, the first step is repeated with the mean of the noise at its two ends: one more call of the denoiser.

    Raises:
        UserError: the schedule has no signal left at the first timestep (zero terminal SNR).
    """
    history: list[Tensor] = []
    for step, t, abar, abar_next in steps:
        if abar == 0:
            raise UserError("got zero terminal SNR, from which pndm cannot start: use ddim, euler or dpmpp_2m")
        history = [*history[-3:], steps.predict(x, t)[1]]
        weighted = (w * e for w, e in zip(ADAMS_BASHFORTH[len(history)], reversed(history), strict=True))
        epsilon = sum(weighted, start=torch.zeros_like(x))
        if step == 0 and len(steps.timesteps) > 1:
            there = _transfer(x, epsilon, abar, abar_next)
            epsilon = (epsilon + steps.predict(there, steps.timesteps[1])[1]) / 2
        x = _transfer(x, epsilon, abar, abar_next)
        steps.report(step, x)
    return x


def lcm(x: Tensor, steps: Steps) -> Tensor:
    """Multistep consistency sampling for latent consistency models (Luo et al. 2023, arXiv 2310.04378, Alg. 3).

    Every step jumps to clean data, c_skip x + c_out x_0 (Eq. 9), and back to the next timestep with fresh noise.
    """
    for step, t, _, abar_next in steps:
        clean, _ = steps.predict(x, t)
        scaled = float(t) * LCM_TIMESTEP_SCALE
        norm = (scaled**2 + LCM_SIGMA_DATA**2) ** 0.5
        x = (LCM_SIGMA_DATA / norm) ** 2 * x + scaled / norm * clean
        if step + 1 < len(steps.timesteps):
            x = abar_next**0.5 * x + (1 - abar_next) ** 0.5 * steps.draw(x)
        steps.report(step, x)
    return x


def _transfer(x: Tensor, epsilon: Tensor, abar: float, abar_next: float) -> Tensor:
    """x at another noise level, if its noise is `epsilon`."""
    return (abar_next / abar) ** 0.5 * (x - (1 - abar) ** 0.5 * epsilon) + (1 - abar_next) ** 0.5 * epsilon


def _half_log_snr(abar: float) -> float:
    return math.log(abar / (1 - abar)) / 2 if 0 < abar < 1 else math.copysign(math.inf, abar - 0.5)


# Euler's method on dx/dsigma = noise, sigma² = (1 - abar)/abar (Karras et al. 2022, arXiv 2206.00364, Alg. 1), scaled
# by sqrt(abar), is DDIM without noise. Its ancestral form steps down to sigma_down and adds noise up to sigma',
# sigma_up² = sigma'² (sigma² - sigma'²) / sigma²: DDPM's posterior variances, DDIM with eta 1.
SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": ddim,
    "euler_ancestral": partial(ddim, eta=1.0),
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
