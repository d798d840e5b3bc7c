"""Text2Video-Zero on the golden network: its first frame is the image model's, the others move away from it."""

from pathlib import Path

import pytest
import torch

from animatediff.features.noise import seeded
from animatediff.lab.zero_shot import MOTION, move, text2video_zero
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from animatediff.world.read import score_clip
from tests.nano import entry, write_config, write_files

CONFIG = Path(__file__).parents[2] / "configs/animate/shapes.yaml"
PROMPTS = ["a red fox", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def pipeline(folder):
    config = write_config(folder / "image.yaml", entry(folder, motion_module="", H=32, W=32))
    return AnimateDiffPipeline.from_config(config, device="cpu")


@pytest.fixture(scope="module")
def run(pipeline):
    def run(prompts=PROMPTS, seeds=(3, 4), **arguments):
        return text2video_zero(pipeline, prompts, seeds, **{"frames": 4, "steps": 4} | arguments)

    return run


@pytest.mark.parametrize(
    "levels, visited", [((941, 881), [941, 751, 501, 251, 1]), ((600, 300), [751, 600, 501, 251, 1])]
)
def test_first_frame_is_the_image_models(pipeline, run, levels, visited):
    """Which visits T, too, where its timesteps pass T; below those it begins there."""
    clips = run(levels=levels)
    generators = [seeded(3), seeded(4)]
    images = pipeline(PROMPTS, num_frames=1, timesteps=visited, generator=generators, output_type="pt").frames
    assert clips.shape == (2, 4, 3, 32, 32) and clips.isfinite().all() and clips.abs().max() <= 1
    assert torch.allclose(clips[:, :1] / 2 + 0.5, images, atol=1e-3)
    assert torch.allclose(run(levels=levels, frames=1), clips[:, :1], atol=1e-3)


def test_levels_say_how_free_the_frames_are(run):
    """Where hardly any noise is added, and nothing moves, the clip stands still."""
    means = []
    for low in (940.999, 881, 500):
        clips = run(motion=(0.0, 0.0), levels=(941, low))
        means.append(float((clips - clips[:, :1]).abs().mean()))
    assert means[0] < 0.01 < means[1] < means[2]


@pytest.mark.slow
@pytest.mark.parametrize("side", [1, -1])
def test_motion_goes_where_it_is_told(side):
    """Whatever the prompt says. The bundled model's noise levels are those of 16 x 16 cells."""
    bundled = AnimateDiffPipeline.from_config(CONFIG, motion_module="", device="cpu")
    clip = text2video_zero(
        bundled,
        ["a large yellow cross standing still on a gray background"],
        [9],
        steps=4,
        guidance_scale=3.0,
        motion=(side * MOTION / 2, 0.0),  # of the world's own slides this is 0.4
        levels=(636, 546),
    )
    score = score_clip(clip[0])
    assert (score.color, score.shape, score.background) == ("yellow", "cross", "gray")
    assert side * score.amplitudes["right"] > 0.25 > abs(score.amplitudes["down"])


def test_each_clip_for_itself(run):
    assert torch.allclose(run()[1:], run(PROMPTS[1:], [4]), atol=1e-3)


def test_move():
    """Right and down, in whole cells, mirrored at the edges."""
    x = torch.arange(12.0).reshape(1, 3, 4)
    assert torch.equal(move(x, 0.1, -0.1), x)
    assert torch.equal(move(x, 0.25, 1 / 3), x[:, [0, 0, 1]][..., [0, 0, 1, 2]])
    assert torch.equal(move(x, -0.5, 0), x[..., [2, 3, 3, 2]])
    assert torch.equal(move(x, 1, 0), x.flip(-1)) and torch.equal(move(x, 2, -2), x)


def test_bad_input(folder, pipeline, run):
    with pytest.raises(UserError, match="got 1 seeds for 2 prompts"):
        run(seeds=[1])
    with pytest.raises(UserError, match="got timesteps .881, 941., expected falling numbers"):
        run(levels=(881, 941))
    with pytest.raises(UserError, match="num_frames: got 0"):
        run(frames=0)
    video = AnimateDiffPipeline.from_config(write_config(folder / "video.yaml", entry(folder)), device="cpu")
    with pytest.raises(UserError, match="got a motion module, expected an image model"):
        text2video_zero(video, PROMPTS, [3, 4])
