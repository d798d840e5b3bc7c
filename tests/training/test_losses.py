"""The denoising loss: the plain one, min-SNR weights, offset noise."""

import pytest
import torch

from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.training.losses import LossConfig, denoising_loss, min_snr_weights
from animatediff.utils import UserError

T = torch.tensor([0, 300, 999])
X0 = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def loss(config: LossConfig, prediction: str = "epsilon", seed: int = 0) -> float:
    schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
    generator = torch.Generator().manual_seed(seed)
    return denoising_loss(lambda x, t: 0.5 * x, schedule, X0, T, generator, config).item()


def test_min_snr_weights():
    """Counted on x0, the errors of all predictions weigh min(SNR, gamma) (arXiv 2303.09556, sec. 3.4)."""
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule(ScheduleConfig(prediction_type=prediction))
        alpha = schedule.alphas_cumprod[T]
        snr = alpha / (1 - alpha)
        assert snr[0] > 5 > snr[2]
        x0_error_over_own = {"epsilon": 1 / snr, "v_prediction": 1 - alpha, "sample": torch.ones(3)}[prediction]
        weights = min_snr_weights(schedule, T, 5.0)
        assert torch.allclose(weights, x0_error_over_own * snr.clamp(max=5), rtol=1e-4), prediction


def test_without_a_limit_nothing_is_weighted():
    assert loss(LossConfig(min_snr_gamma=1e9)) == pytest.approx(loss(LossConfig()), rel=1e-5)
    assert loss(LossConfig(min_snr_gamma=5)) < 0.9 * loss(LossConfig())


def test_offset_noise_is_one_number_for_each_channel_of_a_clip():
    seen = []
    schedule = NoiseSchedule(ScheduleConfig())

    def denoise(x, t):
        seen.append(x)
        return x

    for offset in (0.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        denoising_loss(denoise, schedule, torch.zeros_like(X0), T, generator, LossConfig(noise_offset=offset))
    extra = (seen[1] - seen[0])[2] / (1 - schedule.alphas_cumprod[999]).sqrt()
    assert torch.allclose(extra, extra[:1, :, :1, :1].expand_as(extra), atol=1e-5)
    assert 0.01 < extra.abs().max() < 2


def test_bad_values():
    with pytest.raises(UserError, match="min_snr_gamma: got -1, expected at least 0"):
        LossConfig(min_snr_gamma=-1)
