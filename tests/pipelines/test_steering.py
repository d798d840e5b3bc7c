"""What steers an animation, through the pipeline: what is off changes nothing, what is on does what it says."""

import pytest
import torch

from animatediff.pipelines.components import seeded
from animatediff.pipelines.weights import check_entries
from animatediff.steering import FreeInit
from animatediff.utils import UserError

FOX = "a red fox"
CALL = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def run(pipeline):
    """Latents (b, c, f, h, w) of a small call."""

    def run(prompt=FOX, *, seed=3, **arguments):
        return pipeline(prompt, **{"generator": seeded(seed)} | CALL | arguments).frames

    return run


def test_freeinit(run):
    steps = []

    def count(pipe, step, timestep, tensors):
        steps.append((step, timestep))

    clip = run(freeinit=FreeInit(iterations=2, fast=True), callback_on_step_end=count)
    assert steps == [(0, 1), (1, 501), (2, 1)], "one step, then two"
    assert torch.equal(run(freeinit=FreeInit(iterations=1)), run())
    assert not torch.allclose(clip, run(), atol=1e-3) and clip.isfinite().all()
    generators = [seeded(9), seeded(3)]
    both = run([FOX, FOX], generator=generators, freeinit=FreeInit(iterations=2, fast=True), height=64, width=64)
    alone = run(freeinit=FreeInit(iterations=2, fast=True), height=64, width=64)
    assert torch.allclose(both[1:], alone, atol=1e-3), "each clip's fresh noise comes from its own generator"
    with pytest.raises(UserError, match="freeinit fast: got timesteps of your own"):
        run(freeinit=FreeInit(fast=True), num_inference_steps=None, timesteps=[900, 1])


def test_config(make_entry, pipeline):
    (checked,) = check_entries([make_entry(freeinit={"iterations": 2, "filter": "gaussian"})])
    assert checked.entry.freeinit == FreeInit(2, "gaussian")
    assert checked.entry.said() == {"freeinit": FreeInit(2, "gaussian")}
    with pytest.raises(UserError, match="freeinit iterations: got 0"):
        make_entry(freeinit={"iterations": 0})
    with pytest.raises(UserError, match="freeinit: filter: got 'sharp', expected butterworth or gaussian"):
        make_entry(freeinit={"filter": "sharp"})
