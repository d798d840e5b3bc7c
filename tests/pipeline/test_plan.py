"""Planned memory against the allocator's own record of the same networks at work."""

import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from animatediff.config.memory_options import Memory
from animatediff.config.networks import MOTION_VERSIONS, UNetConfig, VAEConfig
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.memory import place
from animatediff.pipeline.plan import MemoryPlan, Sizes, peak_bytes, plan_memory, residual_bytes

UNET = UNetConfig(4, 4, (32, 64), (True, True), 1, 24, 4, norm_num_groups=8).with_motion(MOTION_VERSIONS["v3"])
VAE_CONFIG = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
SMALL = Sizes(UNET, VAE_CONFIG)


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
    """What oneDNN takes for its own layouts of a convolution's maps, the allocator does not know."""
    plan = plan_memory(SMALL, frames=frames, height=side, width=side, memory=Memory(vae_frames=2))
    unet, vae = UNet(UNET).eval(), VAE(VAE_CONFIG).eval()
    x, z = torch.randn(2, frames, 4, side // 8, side // 8), torch.randn(2, 4, side // 8, side // 8)
    step = measured(lambda: unet(x, torch.tensor([1, 1]), torch.randn(2, 77, 24)))
    decoded = measured(lambda: vae.decode(z).clamp(-1, 1))
    assert plan.stages["a step"] == pytest.approx(step, rel=0.15)
    assert decoded < plan.stages["decoding"] < 1.5 * decoded
    assert plan.weights["weights, UNet"] == sum(p.nbytes for p in (*unet.parameters(), *unet.buffers()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of the peak")
def test_planned_peaks_are_those_of_processes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "kernels/benchmarks")
    sys.modules.pop("memory", None)
    import memory

    runs = [(*size, {}) for size in memory.SIZES] + [(*memory.SIZES[1], memory.SWITCHES[0])]
    for row in (row for run in runs for row in memory.measure(*run)):
        assert 0.85 < float(row["ratio"]) < 1.15, row


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "share"), [("float16", 0.5), ("float8", 0.27)])
def test_weights_that_rest_in_fewer_bits_are_counted_so(storage, share):
    sizes = {"frames": 2, "height": 64, "width": 64, "device": "mps"}
    plan, plain = plan_memory(SMALL, memory=Memory(weights=storage), **sizes), plan_memory(SMALL, **sizes)
    unet = place(UNet(UNET).eval(), Memory(weights=storage), torch.device("cpu"), torch.float32)
    resting = sum(p.nbytes for p in unet.parameters())
    assert plan.weights["weights, UNet"] == pytest.approx(resting, rel=0.03)
    assert resting < (share + 0.12) * plain.weights["weights, UNet"]  # proj_in, norms and embeddings stay
    assert plan.stages["a step"] >= plain.stages["a step"], "and a block at a time is whole"


def test_memory_is_counted_while_it_lives():
    def three_of_four():
        a = torch.zeros(1000)
        b = a[:10] + 1  # a view takes nothing, the sum 40 bytes
        del a
        return b, torch.zeros(500), torch.zeros(500)

    assert peak_bytes(three_of_four) == 4040


def test_a_window_bounds_what_a_step_takes():
    sizes = {"height": 64, "width": 64, "device": "cuda"}
    short, long = (plan_memory(SMALL, frames=n, window=4, **sizes) for n in (4, 40))
    assert short.stages["a step"] - 3 * short.latents == long.stages["a step"] - 3 * long.latents
    assert long.latents == 10 * short.latents
    three = plan_memory(SMALL, frames=4, clips=3, **sizes)
    assert 2.9 < three.stages["a step"] / short.stages["a step"] <= 3.01 and three.latents == 3 * short.latents
    half = plan_memory(SMALL, frames=4, dtype=torch.float16, **sizes)
    assert half.weights["weights, UNet"] < 0.52 * short.weights["weights, UNet"]
    assert half.stages["a step"] < 0.6 * short.stages["a step"]


def test_the_peak_is_of_all_that_is_there_at_once():
    plan = MemoryPlan({"weights, UNet": 100, "text": 20}, {"a step": 50, "decoding": 55}, latents=1)
    assert plan.peak == 120 + 1 + 55 and str(plan).splitlines()[-1].startswith("peak")


def test_a_plan_leaves_nothing_behind_that_has_no_contents():
    """What is kept for the next call is made of numbers, whoever asked first."""
    wide = UNetConfig(4, 4, (256,), (False,), 1, 24, 4, norm_num_groups=8)
    plan_memory(Sizes(wide, VAE_CONFIG), frames=1, height=64, width=64)
    with torch.no_grad():
        out = UNet(wide)(torch.zeros(1, 1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 24))
    assert type(out) is torch.Tensor and out.isfinite().all()


def test_residuals_are_those_of_the_skip_connections():
    unet, shapes = UNet(UNET).eval(), []
    for block in unet.down_blocks:
        block.register_forward_hook(lambda block, args, out: shapes.append(list(args[-1])))
    unet.mid_block.register_forward_hook(lambda block, args, out: shapes.append([out]))
    with torch.no_grad():
        unet(torch.randn(2, 3, 4, 16, 12), torch.tensor([1, 1]), torch.randn(2, 5, 24))
    counted = sum(x.nbytes for x in (*shapes[-2], *shapes[-1]))
    assert residual_bytes(UNET, (2, 3, 4, 16, 12), torch.float32) == counted
