"""Pictures and video in, by the bundled model: what its example configs promise, read back by the scorer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from animatediff.config.prompt_yaml import load_config
from animatediff.features.noise import seeded
from animatediff.media.video import read_video
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.world.read import Score, score_clip
from animatediff.world.shapes import Scene, render

CONFIGS = Path(__file__).parents[2] / "configs/animate"
INPUTS = CONFIGS / "inputs"
SCENE = Scene("circle", "purple", "large", "black", "right", x=32.0, y=32.0, angle=0.0, caption="")
WORDS = "a large {} circle {} on a black background"


@pytest.fixture(scope="module")
def shapes():
    return AnimateDiffPipeline.from_config(CONFIGS / "shapes.yaml", device="cpu")


@pytest.fixture(scope="module")
def run(shapes):
    """A clip (f, 3, 64, 64) in [-1, 1] and its latents, in few steps."""

    def run(prompt, *, steps=10, **arguments):
        call = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": seeded(42), "return_dict": False}
        (latents,) = shapes(prompt, output_type="latent", **call | arguments)
        with torch.no_grad():
            return shapes.model.vae.decode_video(latents.transpose(1, 2))[0], latents

    return run


def pictures(name):
    return [Image.fromarray(frame) for frame in read_video(INPUTS / name)[0].numpy()]


def test_the_configs_are_whole():
    """Their inputs are there and fit together; and are what the world draws."""
    for name in ("img2vid", "vid2vid", "inpaint", "extend"):
        assert check_requests(load_config(CONFIGS / f"{name}.yaml").entries)
    for name, scene in (
        ("right.gif", SCENE),
        ("bounce.gif", replace(SCENE, color="red", motion="bounce")),
    ):
        drawn = ((render([scene])[0] / 2 + 0.5) * 255).round().byte().movedim(1, -1)
        assert (read_video(INPUTS / name)[0].int() - drawn.int()).abs().max() <= 6, "a GIF's palette"


@pytest.mark.slow
def test_vid2vid_keeps_the_path(run):
    clip, _ = run(WORDS.format("blue", "moving right"), video=pictures("right.gif"), strength=0.8)
    score = score_clip(clip)
    assert (score.color, score.shape, score.background, score.motion) == ("blue", "circle", "black", "right")
    assert score.amplitudes["right"] == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_an_inverted_clip_comes_back(run, shapes):
    """Unguided, from the noise of the inversion, and the closer the more steps."""
    video = render([SCENE])[0][::4]
    prompt = WORDS.format("purple", "moving right")
    call = {"video": video, "num_frames": 4, "inversion": True, "inversion_prompt": prompt, "strength": 1.0}
    with torch.no_grad():
        expected = shapes.model.vae.encode_video(video[None]).transpose(1, 2)
    errors = []
    for steps in (8, 40):
        _, latents = run(prompt, steps=steps, guidance_scale=1.0, **call)
        errors.append(float((latents - expected).norm() / expected.norm()))
    assert errors[1] < 0.15 and errors[1] < errors[0], errors


@pytest.mark.slow
def test_the_given_frames_are_the_clip_s(run):
    """The middle frames are painted anew between given ones."""
    video, mask = pictures("right.gif"), pictures("middle.gif")
    clip, latents = run(WORDS.format("purple", "moving right"), video=video, mask=mask)
    _, kept = run("", video=video, strength=0.0)
    outside = [0, 1, 2, 3, 12, 13, 14, 15]
    assert torch.equal(latents[:, :, outside], kept[:, :, outside])
    score = score_clip(clip)
    assert (score.color, score.shape, score.motion) == ("purple", "circle", "right") and score.drift == 0


def test_a_picture_begins_a_clip(run):
    clip, _ = run(WORDS.format("purple", "moving right"), image=Image.open(INPUTS / "first.png"))
    score = score_clip(clip)
    assert (score.color, score.motion) == ("purple", "right")
    assert score.amplitudes["right"] == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_a_clip_goes_on_as_it_is(run):
    clip, latents = run(
        WORDS.format("red", "bouncing"), video=pictures("bounce.gif"), extend=8, num_frames=24, height=64, width=64
    )
    score: Score = score_clip(clip[8:])
    assert (score.color, score.shape, score.background, score.motion) == ("red", "circle", "black", "bounce")
    assert score.drift == 0 and score.amplitudes["bounce"] == pytest.approx(1, abs=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "share"),
    [pytest.param(1, 0.6, id="pictures"), pytest.param(2, 0.75, id="scribbles", marks=pytest.mark.slow)],
)
def test_frames_given_to_sparsectrl_appear(run, number, share):
    """Without them the shape begins where the noise says; the frames between them follow."""
    entry = load_config(CONFIGS / "shapes-sparsectrl.yaml").entries[number]
    controlled = AnimateDiffPipeline.from_config(CONFIGS / "shapes-sparsectrl.yaml", entry=number, device="cpu")
    prompt, call = entry.prompts.prompt[0], {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
    images = [Path(__file__).parents[2] / image for image in entry.sparsectrl.images]
    given = {"conditioning_frames": images, "controlnet_frame_indices": [0, -1]}
    clip = controlled(prompt, generator=seeded(43), **given, **call).frames[0] * 2 - 1
    alone, _ = run(prompt, generator=seeded(43))
    world = render([SCENE])[0]

    def distance(video, frame):
        return float((video[frame] - world[frame]).abs().mean())

    for frame in (0, 8, 15):
        assert distance(clip, frame) < 0.06 and distance(clip, frame) < share * distance(alone, frame)
    score = score_clip(clip)
    assert (score.color, score.shape, score.motion) == ("purple", "circle", "right")
