"""FreeInit: golden filters, what a filter of ones and of zeros does, and iterations around a sampler."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from animatediff.config.networks import ScheduleConfig
from animatediff.config.request import FreeInit
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.freeinit import free_init, low_pass, mix_frequencies
from animatediff.utils import UserError

GOLDEN = load_file(Path(__file__).parents[1] / "golden/samplers.safetensors")
SIZE = (16, 8, 12)
FILTERS = ("butterworth", "gaussian", "ideal", "box")


@pytest.mark.parametrize("name", ["butterworth", "gaussian", "ideal"])
def test_golden_filters(name):
    """The golden ideal filter, as all others have it, keeps d² <= 2 stop: a ball of radius sqrt(2 stop)."""
    stop = math.sqrt(2 * 0.25) if name == "ideal" else 0.25
    keep = low_pass(SIZE, FreeInit(filter=name, spatial_stop=stop, temporal_stop=stop))
    assert torch.allclose(torch.fft.fftshift(keep), GOLDEN[f"freeinit.{name}"], atol=1e-6)


def test_golden_mix():
    low, high = (GOLDEN[f"input.freeinit_{name}"].transpose(1, 2) for name in ("latent", "noise"))
    mixed = mix_frequencies(low, high, low_pass(SIZE, FreeInit()))
    assert torch.allclose(mixed.transpose(1, 2), GOLDEN["freeinit.apply_butterworth"], atol=1e-5)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [SIZE, (5, 7, 9)])
def test_filters_keep_the_mean_and_fall(name, size):
    keep = low_pass(size, FreeInit(filter=name, spatial_stop=0.5, temporal_stop=0.5))
    assert keep.shape == size and keep[0, 0, 0] == 1 and 0 <= keep.min() and keep.max() <= 1
    assert keep[size[0] // 2, size[1] // 2, size[2] // 2] < 0.1
    assert not low_pass(size, FreeInit(filter=name, temporal_stop=0.0)).any()


def test_ones_and_zeros():
    low, high = torch.randn(2, 2, 5, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mix_frequencies(low, high, torch.ones(5, 6, 3)), low, atol=1e-5)
    assert torch.equal(mix_frequencies(low, high, torch.zeros(5, 6, 3)), high)


def test_iterations():
    """Each starts from the first noise, the last result and noise of its own; one iteration is plain sampling."""
    schedule = NoiseSchedule(ScheduleConfig())
    draws = [torch.full((1, 4, 1, 2, 2), value) for value in (5.0, 7.0)]
    starts, start = [], torch.randn(1, 4, 1, 2, 2)

    def sample(x, iteration):
        assert iteration == len(starts)
        starts.append(x)
        return 0.5 * x

    settings = FreeInit(iterations=3, filter="box", spatial_stop=1.0, temporal_stop=1.0)  # keeps all
    out = free_init(sample, start, settings, schedule=schedule, noise=iter(draws).__next__)
    signal, sigma = schedule.alphas_cumprod[-1].sqrt(), (1 - schedule.alphas_cumprod[-1]).sqrt()
    expected = [start]
    for _ in range(2):
        expected.append(signal * 0.5 * expected[-1] + sigma * start)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(starts, expected, strict=True))
    assert torch.allclose(out, 0.5 * expected[-1], atol=1e-5)
    starts.clear()
    fresh = FreeInit(iterations=3, spatial_stop=0.0)
    free_init(sample, start, fresh, schedule=schedule, noise=iter(draws).__next__)
    assert torch.equal(starts[1], draws[0]) and torch.equal(starts[2], draws[1])
    starts.clear()
    free_init(sample, start, FreeInit(iterations=1), schedule=schedule, noise=draws.pop)
    assert len(starts) == 1 and len(draws) == 2


def test_settings():
    assert [FreeInit(iterations=3, fast=True).steps(i, 25) for i in range(3)] == [8, 16, 25]
    assert [FreeInit(iterations=5, fast=True).steps(i, 2) for i in range(5)] == [1, 1, 1, 1, 2]
    assert FreeInit().steps(0, 25) == 25
    with pytest.raises(UserError, match="FreeInit: iterations: got 0"):
        FreeInit(iterations=0)
    with pytest.raises(UserError, match="FreeInit: temporal_stop: got 1.5, expected at most 1"):
        FreeInit(temporal_stop=1.5)
