"""Clips that loop without windows: rotated at every step, or played there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.schedule import step_of
from animatediff.features.feature import FrameDenoise
from animatediff.features.windows import van_der_corput


def rotate_loop(denoise: FrameDenoise, timesteps: Tensor) -> Denoise:
    """A denoiser of clips that loop: all frames together, beginning with another one at every step.

    So the borders of the clip, which positional encodings make differ, never stay in one place.

    Args:
        timesteps: (steps,), those of the sampler.
    """

    def denoise_loop(x: Tensor, t: Tensor) -> Tensor:
        turn = round(x.shape[1] * van_der_corput(step_of(timesteps, t)))
        frames = torch.arange(x.shape[1]).roll(-turn)
        return denoise(x.roll(-turn, dims=1), t, frames).roll(turn, dims=1)

    return denoise_loop


def pingpong(x: Tensor) -> Tensor:
    """Frames (b, f, …) there and back, without the ends twice: (b, 2 f - 2, …)."""
    return torch.cat([x, x[:, 1:-1].flip(1)], dim=1)
