"""Styles, watermarks and camera moves are read from rendered and degraded clips, and never from other ones."""

import pytest
import torch

from animatediff.world.camera import CAMERA, make_camera_scene
from animatediff.world.evaluate import shuffle_frames
from animatediff.world.read import LABELS, NONE
from animatediff.world.read_camera import read_camera
from animatediff.world.read_styles import (
    read_style,
    read_watermark,
    score_styled,
    watermark_rate,
    without_watermark,
)
from animatediff.world.report import summarise
from animatediff.world.shapes import MOTIONS, make_scene, render
from animatediff.world.styles import STYLES, stamp
from tests.world.test_read import blurred, degraded

SCENES = [make_scene(i, seed=1, motion=list(MOTIONS)[i % 10]) for i in range(30)]


@pytest.fixture(
    scope="module", params=["neon", *(pytest.param(s, marks=pytest.mark.slow) for s in STYLES if s != "neon")]
)
def styled(request):
    return request.param, render(SCENES, style=STYLES[request.param])


def test_rendered_styles(styled):
    style, clips = styled
    assert [read_style(clip) for clip in clips].count(style) == 30
    summary = summarise([score_styled(clip, style) for clip in clips], SCENES)
    assert min(summary[label] for label in LABELS) >= 99, summary


@pytest.mark.slow
def test_degraded_styles(styled):
    style, clips = styled
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    soft = (blurred(clips, 0.8) + 0.03 * noise).clamp(-1, 1)
    assert [read_style(clip) for clip in soft].count(style) >= 29


def test_watermarks(styled):
    style, clips = styled
    assert watermark_rate(clips) <= 1 and watermark_rate(stamp(clips)) >= 99
    assert watermark_rate(degraded(stamp(clips[:20]))) >= 97
    assert read_watermark(stamp(clips[0])) > 0.8


def test_watermarks_hide_nothing(styled):
    style, clips = styled
    assert torch.allclose(without_watermark(stamp(clips[3])), clips[3], atol=1e-5)
    assert torch.equal(without_watermark(clips[3]), clips[3])
    assert [read_style(clip) for clip in stamp(clips[:10])].count(style) == 10


def test_an_empty_picture_has_no_style_and_no_watermark():
    gray = torch.zeros(16, 3, 64, 64)
    assert read_style(gray) == "plain" and watermark_rate([gray]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("motion", CAMERA)
def test_camera_moves(motion):
    clips = render([make_camera_scene(i, motion, seed=1) for i in range(30)])
    assert [read_camera(clip) for clip in clips].count(motion) == 30
    assert [read_camera(clip) for clip in degraded(clips[:20])].count(motion) >= 19
    backwards = {"zoom_in": "zoom_out", "zoom_out": "zoom_in", "orbit": NONE}[motion]
    assert [read_camera(clip) for clip in clips[:20].flip(1)].count(backwards) >= 19
    assert [read_camera(clip) for clip in shuffle_frames(clips[:20])].count(NONE) >= 19


def test_shapes_that_move_by_themselves_are_no_camera_moves():
    assert [read_camera(clip) for clip in render(SCENES)].count(NONE) == 30
