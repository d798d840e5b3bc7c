"""Planned memory against the allocator's own record of the same networks at work."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from animatediff.config.networks import MOTION_VERSIONS, UNetConfig, VAEConfig
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.plan import MemoryPlan, peak_bytes, plan_memory

UNET = UNetConfig(4, 4, (32, 64), (True, True), 1, 24, 4, norm_num_groups=8).with_motion(MOTION_VERSIONS["v3"])
VAE_CONFIG = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)


@torch.no_grad()
def measured(function) -> int:
    """The most bytes that torch's allocator had handed out, by its own record."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


@pytest.mark.parametrize(
    ("frames", "side"), [(2, 128), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((4, 192), (8, 256)))]
)
def test_planned_peaks_are_those_measured(frames, side):
    plan = plan_memory(UNET, VAE_CONFIG, frames=frames, height=side, width=side, chunk_frames=2)
    unet, vae = UNet(UNET).eval(), VAE(VAE_CONFIG).eval()
    x, z = torch.randn(2, frames, 4, side // 8, side // 8), torch.randn(2, 4, side // 8, side // 8)
    assert plan.denoise == pytest.approx(
        measured(lambda: unet(x, torch.tensor([1, 1]), torch.randn(2, 77, 24))), rel=0.15
    )
    assert plan.decode == pytest.approx(measured(lambda: vae.decode(z)), rel=0.15)
    assert plan.weights["UNet"] == sum(p.nbytes for p in (*unet.parameters(), *unet.buffers()))


def test_memory_is_counted_while_it_lives():
    def three_of_four():
        a = torch.zeros(1000)
        b = a[:10] + 1  # a view takes nothing, the sum 40 bytes
        del a
        return b, torch.zeros(500), torch.zeros(500)

    assert peak_bytes(three_of_four) == 4040


def test_a_window_bounds_what_a_step_takes():
    sizes = {"height": 64, "width": 64}
    short, long = (plan_memory(UNET, VAE_CONFIG, frames=n, window=4, **sizes) for n in (4, 40))
    assert short.denoise == long.denoise and long.latents == 10 * short.latents
    half = plan_memory(UNET, VAE_CONFIG, frames=4, dtype=torch.float16, **sizes)
    assert half.weights["UNet"] < 0.52 * short.weights["UNet"] and half.denoise < 0.6 * short.denoise


def test_the_peak_is_of_all_that_is_there_at_once():
    plan = MemoryPlan({"UNet": 100, "text": 20}, denoise=50, decode=40, latents=1, video=15)
    assert plan.peak == 120 + 1 + 55 and str(plan).splitlines()[-1].startswith("peak")


def test_a_plan_leaves_nothing_behind_that_has_no_contents():
    """What is kept for the next call is made of numbers, whoever asked first."""
    wide = UNetConfig(4, 4, (256,), (False,), 1, 24, 4, norm_num_groups=8)
    plan_memory(wide, VAE_CONFIG, frames=1, height=64, width=64)
    with torch.no_grad():
        out = UNet(wide)(torch.zeros(1, 1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 24))
    assert type(out) is torch.Tensor and out.isfinite().all()
