"""On a GPU (pytest -n 0 -m gpu): every shape of the real network, and fifty training steps with and without kernels."""

import math
import sys
from pathlib import Path

import pytest
import torch
from animatediff_kernels import temporal_attention, use_backend

from animatediff.checkpoints.load import load_motion_module
from animatediff.pipeline.device import to_device
from animatediff.training.diffusion_stages import DiffusionStage, freeze, unfreeze_motion_modules
from animatediff.training.latents import LatentClips
from animatediff.training.sources import load_image_model
from animatediff.world.series import World

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "kernels/benchmarks"))
import ops  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ASSETS = ROOT / "animatediff/assets"
STEPS = 50


@pytest.mark.parametrize("mode", run.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("clip", ["16f-512", "24f-512", "16f-512-pooled"])
def test_every_shape_of_the_network(clip, op, dtype, mode):
    """The matrix of the interpreter's tests at full size: at most twice the error of torch's own, plus 1e-6."""
    spec = ops.OPS[op]
    for shape in shapes.trace(clip):
        if shape.op != op:
            continue
        sizes = dict(shape.sizes)
        inputs = ops.make_inputs(spec, sizes, "cuda", dtype)
        one, part = run.cut(spec, sizes, inputs, 0)
        bound = 2 * run.error(spec.plain(one), spec, one, part, mode) + run.NOISE
        assert math.isfinite(bound)
        assert run.error(spec.run(sizes, "triton"), spec, sizes, inputs, mode) <= bound, shape
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def small_clip():
    return shapes.trace("16f-256")


@pytest.mark.parametrize("mode", run.MODES)
@pytest.mark.parametrize("op", ops.OPS)
def test_replayed_in_a_cuda_graph(small_clip, op, mode):
    """What was captured once computes from the values that its inputs have when it is replayed."""
    spec = ops.OPS[op]
    sizes = next(dict(shape.sizes) for shape in small_clip if shape.op == op)
    inputs, function = ops.make_inputs(spec, sizes, "cuda", torch.float16), spec.run(sizes, "triton")
    warm, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):  # compiles the kernels, sets up cuBLAS
        captured = ops.call(function, inputs, mode)
        captured()
    torch.cuda.current_stream().wait_stream(warm)
    with torch.cuda.graph(graph):
        found = captured()
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(found, captured())


def test_more_pixels_than_a_grid_axis_takes():
    """A guided clip of 1024x1024 has 2 * 128 * 128 pixels of 8 heads each."""
    qkv = torch.randn(2 * 2, 128 * 128, 3 * 8 * 40, device="cuda", dtype=torch.float16)
    q, k, v = qkv.chunk(3, -1)
    got, expected = (temporal_attention(q, k, v, frames=2, num_heads=8, backend=b) for b in ("triton", "torch"))
    assert torch.allclose(got, expected, rtol=1e-3, atol=2e-3)  # an ulp, where it is rounded


def losses(folder: Path, backend: str, device: str, steps: int) -> torch.Tensor:
    """Of the bundled model's motion module, trained on the toy data set."""
    base = load_image_model(str(ASSETS / "shapes.safetensors"))
    unet, _ = load_motion_module(base.unet, ASSETS / "shapes_motion.safetensors")
    clips = LatentClips.of_world(folder / "clips.pt", base.vae, World(clips=16), log=lambda line: None)
    unet, text_encoder = (to_device(m, torch.device(device), torch.float32) for m in (unet, base.text_encoder))
    freeze(unet, text_encoder)
    stage = DiffusionStage(
        "motion",
        unet,
        text_encoder,
        base.schedule,
        clips,
        trainable=unfreeze_motion_modules(unet),
        save=lambda *_: None,
    )
    optimizer = torch.optim.AdamW((p for _, p in unet.motion_parameters()), lr=1e-4)
    found = []
    with use_backend(backend):
        for step in range(steps):
            loss, _ = stage.loss(step, 2, torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return torch.tensor(found)


def test_training_with_kernels_is_training_without(tmp_path):
    without, with_them = (losses(tmp_path, backend, "cuda", STEPS) for backend in ("torch", "triton"))
    assert torch.allclose(with_them, without, rtol=1e-2), (with_them / without - 1).abs().max()
