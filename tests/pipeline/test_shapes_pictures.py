"""The bundled ControlNet and IP-Adapter do what they are for: outlines say where, a picture says in which colours."""

from pathlib import Path

import pytest
import torch

from animatediff.media.scribble import draw_scribbles
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from animatediff.world.read import read_background, read_color
from animatediff.world.series import World

CONFIG = Path(__file__).parents[2] / "configs/eval/pictures.yaml"
SCENES = World(4, motions=("still", "left", "up", "clockwise"), seed=1)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """The middle frame (n, 3, 64, 64) of each scene, in [-1, 1]."""
    return torch.stack([SCENES.render([i])[0][0, 8] for i in range(SCENES.clips)])


def drawn(entry: int, captions: list[str], **options) -> torch.Tensor:
    """Frame i from noise of seed i, (n, 3, 64, 64) in [-1, 1]."""
    pipe = AnimateDiffPipeline.from_config(CONFIG, entry=entry, device="cpu", motion_module="")
    call = {"num_frames": 1, "num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "pt"}
    found = []
    for i, caption in enumerate(captions):
        given = {name: {"images": value[i : i + 1]} for name, value in options.items()}
        found.append(pipe(caption, **call, **given, generator=torch.Generator().manual_seed(i)).frames[0, 0])
    return torch.stack(found) * 2 - 1


@pytest.mark.slow
def test_outlines_say_where(frames):
    captions = [SCENES.scene(i).caption for i in range(SCENES.clips)]
    lines = draw_scribbles(frames)[:, None].expand_as(frames).float()
    outlined, free = drawn(0, captions, controlnet=lines), drawn(2, captions)
    error = lambda got: float((got - frames).abs().mean())  # noqa: E731
    assert error(outlined) < 0.07 and error(outlined) < 0.6 * error(free)


def test_words_of_a_scene():
    assert SCENES.said("a {shape} {motion}", [1]) == [f"a {SCENES.scene(1).shape} moving left"]
    for text in ("{colour}", "{", "{0}", "{shape.x}"):
        with pytest.raises(UserError, match="prompt: got .* expected text with {size}"):
            SCENES.said(text, [0])


def test_a_picture_says_in_which_colours(frames):
    pictured = drawn(1, SCENES.said("a {size} {shape} {motion}", range(SCENES.clips)), ip_adapter=frames / 2 + 0.5)
    pixels = (pictured[:, None] + 1) * 127.5
    scenes = [SCENES.scene(i) for i in range(SCENES.clips)]
    right = [
        (read_color(frame)[0], read_background(frame)[0]) == (scene.color, scene.background)
        for frame, scene in zip(pixels, scenes, strict=True)
    ]
    assert sum(right) >= 3, right
