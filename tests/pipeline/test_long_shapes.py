"""Long clips and loops by the bundled model, in windows of frames: identity stays, ends meet or do not."""

from pathlib import Path

import pytest

from animatediff.config.request import Windows
from animatediff.features.noise import seeded
from animatediff.metrics.video_metrics import loop_seam
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.world.read import score_clip

CONFIG = Path(__file__).parents[2] / "configs/animate/shapes.yaml"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run():
    shapes = AnimateDiffPipeline.from_config(CONFIG, device="cpu")

    def run(prompt, frames, schedule, **steering):
        call = {"num_inference_steps": 12, "guidance_scale": 3.0, "sampler": "dpmpp_2m", "generator": seeded(1)}
        windows = Windows(schedule, 16, 4)
        return (
            shapes(prompt, num_frames=frames, windows=windows, output_type="pt", **call, **steering).frames[0] * 2 - 1
        )

    return run


def test_an_open_clip_keeps_its_identity_and_does_not_repeat_itself(run):
    clip = run("a large red circle bouncing on a black background", 64, "open", noise_type="shuffle")
    for quarter in clip.split(16):
        score = score_clip(quarter)
        assert (score.color, score.shape, score.background) == ("red", "circle", "black")
        assert score.drift <= 0.2  # of the frames in which it bounces off the floor, some are vague
    change = float(clip.diff(dim=0).abs().mean())
    assert change > 0.02
    assert min(float((clip[lag:] - clip[:-lag]).abs().mean()) for lag in range(8, 49)) > 0.3 * change


def test_a_closed_clip_moves_and_goes_on_into_its_beginning(run):
    clip = run("a large green star spinning clockwise on a white background", 32, "closed")
    assert loop_seam(clip) <= 1.2
    assert float(clip.diff(dim=0).abs().mean()) > 0.015  # as the slowest rendered ones
    assert score_clip(clip[:16]).color == "green" and score_clip(clip[16:]).shape == "star"
