"""What the measuring of a model hands to its pipeline."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from animatediff.config.prompt_yaml import load_config
from animatediff.lab.run_model import clip_maker, controlled_clip_maker, pictured_clip_maker
from animatediff.media.scribble import draw_scribbles
from animatediff.utils import UserError
from animatediff.world.series import World

EVAL = Path(__file__).parents[2] / "configs/eval"
ENTRY = load_config(Path(__file__).parents[2] / "configs/animate/shapes.yaml").entries[0]


class Pipeline:
    """Remembers its calls."""

    def __init__(self, kind: str | None):
        config = SimpleNamespace(config=SimpleNamespace(kind=kind))
        self.model, self.calls = SimpleNamespace(sparsectrl=config if kind else None), []

    def __call__(self, captions, **call):
        self.calls.append((captions, call))
        return SimpleNamespace(frames=torch.full((len(captions), 16, 3, 64, 64), len(self.calls) / 2))


@pytest.mark.parametrize("kind", ["rgb", "scribble"])
def test_an_encoder_sees_the_frames_of_each_scene(kind):
    world = World(3, motions=("left", "right", "grow"), seed=1)
    videos, captions = world.render([1, 2])
    pipeline = Pipeline(kind)
    clips = controlled_clip_maker(pipeline, ENTRY, world, (0, 15))(captions, [1, 2])
    assert [float(clip.max()) for clip in clips] == [0.0, 1.0]  # [0, 1] has become [-1, 1]
    for (asked, call), caption, video, seed in zip(pipeline.calls, captions, videos, (1, 2), strict=True):
        shown = call["conditioning_frames"]
        assert asked == [caption] and call["controlnet_frame_indices"] == (0, 15)
        assert [g.initial_seed() for g in call["generator"]] == [seed]
        if kind == "rgb":
            torch.testing.assert_close(shown, video[[0, 15]] / 2 + 0.5)
        else:
            assert torch.equal(shown[:, 1], draw_scribbles(video[[0, 15]]).float()) and shown.shape == (2, 3, 64, 64)


def test_controlnets_and_ip_adapters_see_each_scene():
    world, pipeline = World(2, motions=("left", "grow"), seed=1), Pipeline(None)
    videos, captions = world.render([0, 1])
    entries = load_config(EVAL / "pictures.yaml", complete=False).entries
    for entry in entries:
        pictured_clip_maker(pipeline, entry, world)(captions, [0, 1])
    outlines, pictures, plain = pipeline.calls[:2], pipeline.calls[2:4], pipeline.calls[4:]
    for (asked, call), caption, video in zip(outlines, captions, videos, strict=True):
        assert asked == [caption] and "ip_adapter" not in call
        assert torch.equal(call["controlnet"][0]["images"][:, 0], draw_scribbles(video).float())
    for (_, call), video in zip(pictures, videos, strict=True):
        assert torch.equal(call["ip_adapter"][0]["images"], video[8:9] / 2 + 0.5) and "controlnet" not in call
    assert [asked for asked, _ in plain] == [captions] and "controlnet" not in plain[0][1]


def test_an_entry_frames_its_captions():
    pipeline = Pipeline(None)
    words = replace(ENTRY.prompts, head_prompt="a film", tail_prompt="4k", negative_prompt=("bad",))
    framed = replace(ENTRY, prompts=words)
    clip_maker(pipeline, framed)(["a star", "a cross"], [0, 1])
    ((prompts, call),) = pipeline.calls
    assert prompts == ["a film, a star, 4k", "a film, a cross, 4k"] and call["negative_prompt"] == ("bad",)


def test_frames_want_an_encoder():
    with pytest.raises(UserError, match="without a SparseCtrl encoder, expected one: set controlnet_path"):
        controlled_clip_maker(Pipeline(None), ENTRY, World(1), (0,))
