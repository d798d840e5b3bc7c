"""DDIM inversion comes back: on the exact denoiser of a Gaussian, in every prediction type, up to pure noise."""

import pytest
import torch

from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.inversion import invert
from animatediff.diffusion.samplers import Steps, ddim
from animatediff.diffusion.schedule import NoiseSchedule

DATA_STD = 0.5


def exact_denoiser(schedule):
    """Of data N(0, DATA_STD²)."""

    def denoise(x, t):
        alpha = schedule.alpha_at(t).reshape(-1, 1, 1, 1, 1)
        clean = alpha.sqrt() * DATA_STD**2 / (alpha * DATA_STD**2 + 1 - alpha) * x
        return schedule.target(clean, (x - alpha.sqrt() * clean) / (1 - alpha).sqrt(), t)

    return denoise


def round_trip(steps, *, skip=0, **config):
    schedule = NoiseSchedule(ScheduleConfig(**config))
    timesteps = schedule.timesteps(steps)[skip:]
    clean = DATA_STD * torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoise = exact_denoiser(schedule)
    noisy = invert(denoise, clean, schedule=schedule, timesteps=timesteps)
    back = ddim(noisy, Steps(denoise, schedule, timesteps))
    return clean, noisy, float((back - clean).norm() / clean.norm())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
def test_round_trip(prediction_type, spacing):
    errors = [round_trip(n, prediction_type=prediction_type, timestep_spacing=spacing)[2] for n in (25, 100)]
    assert errors[0] < 0.25 and errors[1] < errors[0] / 2, errors


def test_inverted_data_is_standard_noise():
    """The flow takes N(0, std²) at clean data to N(0, 1): it only scales."""
    clean, noisy, _ = round_trip(400)
    assert noisy.std() == pytest.approx(1, abs=0.05)
    assert torch.allclose(noisy / noisy.std(), clean / clean.std(), atol=1e-4)


def test_part_of_the_way():
    """Up to the timestep that a strength below 1 starts from."""
    assert round_trip(25, skip=15)[2] < 0.1


def test_up_to_zero_terminal_snr():
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    _, noisy, error = round_trip(100, **config)
    assert noisy.isfinite().all() and error < 0.2
