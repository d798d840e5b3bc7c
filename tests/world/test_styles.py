"""Styles, watermark and camera moves of Shapes, the toy data set; test_read_styles.py reads them back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from animatediff.world.camera import CAMERA, make_camera_scene
from animatediff.world.shapes import BACKGROUNDS, COLORS, MOTIONS, SIZE, ZOOM, make_scene, poses, render
from animatediff.world.styles import STYLES, stamp, watermark

SCENES = [make_scene(i, seed=3, motion=list(MOTIONS)[i]) for i in range(10)]
GOLDEN = [
    -0.85618,
    0.03162,
    -0.01025,
    0.79183,
    0.03037,
    -0.69279,
    0.37121,
    0.45147,
    0.81997,
    0.90925,
]  # mean of every clip


def test_the_plain_look_is_what_models_were_trained_on():
    clips = render(SCENES)
    assert clips.mean(dim=(1, 2, 3, 4)).tolist() == pytest.approx(GOLDEN, abs=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_paints_the_same_scene(style):
    clips = render(SCENES, style=STYLES[style])
    assert clips.shape == (10, 16, 3, SIZE, SIZE) and clips.min() >= -1 and clips.max() <= 1
    assert torch.equal(clips, render(SCENES, style=STYLES[style]))
    some = render(SCENES, only_frames=np.array([[15, 3]] * 10), style=STYLES[style])
    assert torch.allclose(some, clips[:, [15, 3]], atol=1e-5)
    others = [render(SCENES, style=other) for name, other in STYLES.items() if name != style]
    assert all((clips - other).abs().mean() > 0.01 for other in others)


def test_strokes_cross_the_shape_alone():
    scene = replace(make_scene(1, motion="still", shape="square", color="red", background="white"), x=32.0, y=32.0)
    plain, hatched = (render([scene], style=STYLES[name])[0, 0] for name in ("plain", "hatched"))
    differs = (plain - hatched).abs().amax(dim=0) > 0.01
    inside = (plain - plain[:, :1, :1]).abs().amax(dim=0) > 0.01
    assert differs.any() and not (differs & ~inside).any() and 0.2 < differs.sum() / inside.sum() < 0.7


def test_blocks_are_pale():
    clip = render(SCENES[:1], style=STYLES["pixelated"])[0]
    assert torch.equal(clip[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2), clip)
    assert clip.min() > -0.2


def test_the_watermark_is_translucent_and_always_the_same():
    band, letters = watermark()
    black, white = (stamp(torch.full((3, SIZE, SIZE), value)) for value in (-1.0, 1.0))
    assert set(letters.unique().tolist()) == {0, 1} and bool((band >= letters).all())
    assert torch.equal(black[0] > -1, letters > 0) and torch.equal(white[0] < 1, band > 0)
    clips = render(SCENES)
    assert torch.equal(stamp(clips)[3, 5], stamp(clips[3, 5]))
    assert torch.equal(stamp(clips)[..., band == 0], clips[..., band == 0])


@pytest.mark.parametrize("motion", CAMERA)
def test_camera_scenes(motion):
    scenes = [make_camera_scene(i, motion, seed=2) for i in range(30)]
    assert scenes[7] == make_camera_scene(7, motion, seed=2)
    for scene in scenes:
        assert any(words in scene.caption for words in CAMERA[motion])
        assert not any(words in scene.caption for table in MOTIONS.values() for words in table)
        assert scene.color in COLORS and scene.background in scene.caption and scene.background in BACKGROUNDS
        x, y, radius, angle = poses(scene).T
        assert min(x.min(), y.min(), *(x - radius), *(y - radius)) > 0 and np.ptp(angle) == 0
        assert max(*(x + radius), *(y + radius)) < SIZE
        if motion == "orbit":
            assert np.ptp(radius) == 0 and np.ptp(x) == pytest.approx(18) and np.ptp(y) == pytest.approx(18)
            continue
        way = np.hypot(x - SIZE / 2, y - SIZE / 2)
        factor = ZOOM if motion == "zoom_in" else 1 / ZOOM
        assert radius[-1] / radius[0] == pytest.approx(factor) and way[-1] / way[0] == pytest.approx(factor)
