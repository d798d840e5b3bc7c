"""Shapes, the toy data set: the same everywhere, drawn as its labels say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.world.shapes import (
    BACKGROUNDS,
    COLORS,
    FLOOR,
    FRAMES,
    MOTIONS,
    RADII,
    SHAPES,
    SIZE,
    SIZES,
    SPINS,
    TRAVEL,
    TURNS,
    make_scene,
    poses,
    render,
    shape_distance,
)

SCENES = [make_scene(i, seed=3, motion=list(MOTIONS)[i % len(MOTIONS)]) for i in range(100)]


def test_a_scene_is_its_number():
    scene = make_scene(7, seed=5)
    assert scene == make_scene(7, seed=5)
    assert scene != make_scene(8, seed=5) and scene != make_scene(7, seed=6)
    assert (scene.shape, scene.color, scene.background, scene.motion) == ("square", "cyan", "beige", "right")
    assert scene.caption == "a cyan square going right on a beige background"
    assert (scene.x, scene.y, scene.angle) == pytest.approx((33.903705, 25.426994, -0.00746), abs=1e-6)


def test_given_labels_replace_the_drawn_ones():
    drawn = make_scene(11, seed=2, motion="left")
    given = make_scene(11, seed=2, motion="left", shape="star", color="pink", background="gray")
    assert (given.shape, given.color, given.background) == ("star", "pink", "gray")
    assert (given.x, given.y, given.angle, given.size) == (drawn.x, drawn.y, drawn.angle, drawn.size)


def test_every_label_occurs():
    scenes = [make_scene(i) for i in range(400)]
    for label, names in (("shape", SHAPES), ("color", COLORS), ("background", BACKGROUNDS), ("motion", MOTIONS)):
        counts = [sum(getattr(scene, label) == name for scene in scenes) for name in names]
        assert min(counts) > 400 / len(names) / 2, label


@pytest.mark.parametrize("scene", SCENES[:20], ids=lambda scene: scene.caption)
def test_captions_say_what_is_seen(scene):
    words = scene.caption.replace(",", "").split()
    assert scene.color in words and scene.shape in words and scene.background in words
    called = {name: any(phrase in scene.caption for phrase in phrases) for name, phrases in MOTIONS.items()}
    assert [name for name, found in called.items() if found] == [scene.motion]
    assert not set(SIZES) - {scene.size} & set(words)
    assert (scene.size == "") == (scene.motion in ("grow", "shrink"))


def test_what_spins():
    """No circles, unless asked for; and no word tells one direction that the other has, too."""
    spins = [scene for scene in SCENES if scene.motion in SPINS]
    assert {scene.shape for scene in spins} == set(SHAPES) - {"circle"}
    assert make_scene(4, motion="clockwise", shape="circle").shape == "circle"
    ways = [set(" ".join(MOTIONS[motion][:3]).split()) for motion in SPINS]
    assert ways[0] & ways[1] == {"spinning", "rotating", "turning"}


@pytest.mark.parametrize("motion", MOTIONS)
def test_poses(motion):
    scene = make_scene(4, motion=motion)
    x, y, radius, angle = poses(scene).T
    first_to_last = {
        "left": (-TRAVEL, 0, 1, 0),
        "right": (TRAVEL, 0, 1, 0),
        "up": (0, -TRAVEL, 1, 0),
        "down": (0, TRAVEL, 1, 0),
        "clockwise": (0, 0, 1, 2 * np.pi * TURNS * 15 / 16),
        "counter-clockwise": (0, 0, 1, -2 * np.pi * TURNS * 15 / 16),
        "grow": (0, 0, RADII[1] / RADII[0], 0),
        "shrink": (0, 0, RADII[0] / RADII[1], 0),
    }.get(motion, (0, 0, 1, 0))
    if motion == "bounce":
        bottom = y + radius
        assert bottom.max() == pytest.approx(FLOOR) and bottom.min() == pytest.approx(FLOOR - TRAVEL)
        assert bottom[0] == pytest.approx(bottom[8]) and bottom[4] == pytest.approx(bottom[12])
        y = np.zeros(FRAMES)
    found = (x[-1] - x[0], y[-1] - y[0], radius[-1] / radius[0], angle[-1] - angle[0])
    assert found == pytest.approx(first_to_last, abs=1e-9)


def test_shapes_stay_in_the_picture():
    for scene in SCENES:
        x, y, radius, _ = poses(scene).T
        for middle in (x, y):
            assert (middle - radius).min() > 0 and (middle + radius).max() < SIZE, scene


@pytest.mark.parametrize("shape", SHAPES)
def test_distances(shape):
    grid = torch.linspace(-30, 30, 121)
    distance = shape_distance(shape, grid[None, :], grid[:, None], torch.tensor(10.0))
    assert distance[60, 60] < -3 and distance[0, 0] > 10
    assert float(distance.diff(dim=0).abs().max()) < 0.5 + 1e-4  # the grid's step: never steeper than a distance
    assert torch.allclose(distance, distance.flip(1), atol=1e-4)  # left is right
    area = float((distance < 0).float().sum()) / 4
    assert 150 < area < 320  # a disc has 314


def test_unknown_shape():
    with pytest.raises(ValueError, match="'heart', expected one of circle"):
        shape_distance("heart", torch.zeros(1), torch.zeros(1), torch.ones(1))


def test_render():
    scenes = SCENES[:20]
    videos = render(scenes)
    assert videos.shape == (20, FRAMES, 3, SIZE, SIZE) and videos.dtype == torch.float32
    assert float(videos.min()) >= -1 and float(videos.max()) <= 1
    assert torch.equal(videos, render(scenes))
    assert torch.allclose(videos[7], render([scenes[7]])[0], atol=1e-6)  # whatever else is in the batch
    which = np.array([[15, 0, 3]] * 20)
    assert torch.allclose(render(scenes, only_frames=which), videos[:, [15, 0, 3]], atol=1e-6)


def test_colours_are_the_labels():
    for scene, video in zip(SCENES[:10], render(SCENES[:10]), strict=True):
        frame = ((video[5] + 1) * 127.5).round()
        x, y, radius, angle = poses(scene)[5]
        below = int(x - 0.3 * radius * np.sin(angle)), int(y + 0.3 * radius * np.cos(angle))  # the mark is above
        assert frame[:, below[1], below[0]].tolist() == pytest.approx(COLORS[scene.color], abs=1)
        assert frame[:, 0].median(dim=1).values.tolist() == pytest.approx(BACKGROUNDS[scene.background], abs=6)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_still_frame_hints_at_its_motion(motion):
    """Something besides the shape is drawn, except where nothing moves."""
    labels = {"shape": "circle", "color": "red", "background": "white"}
    scene = replace(make_scene(1, motion=motion, **labels), x=32.0, y=32.0)
    frame = render([scene])[0, 3]
    x, y, radius, _ = poses(scene)[3]
    grid = torch.arange(SIZE) + 0.5
    outside = torch.hypot(grid[None, :] - x, grid[:, None] - y) > radius + 1.5
    differs = (frame - frame[:, :1, :1]).abs().amax(dim=0) > 0.1
    assert bool((differs & outside).any()) == (motion != "still")


@pytest.mark.slow
def test_the_direction_of_a_spin_shows_in_noise():
    """At timestep 960, where a sampler decides what moves how, by a linear probe on coarse pixels.

    The probe is the difference of the directions' mean rendered clips, with brightness counted from the background on
    towards the ink.
    """
    abar = float(NoiseSchedule(ScheduleConfig()).alphas_cumprod[960])

    def coarse(seed: int, count: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = [make_scene(i, seed=seed, motion=SPINS[i % 2]) for i in range(count)]
        clips = render(scenes)
        if generator:
            clips = abar**0.5 * clips + (1 - abar) ** 0.5 * torch.randn(clips.shape, generator=generator)
        cells = F.avg_pool2d(clips.mean(dim=(1, 2))[:, None], 8).flatten(1)
        lighter = torch.tensor([1.0 if scene.background == "black" else -1.0 for scene in scenes])
        way = torch.tensor([1.0 if scene.motion == SPINS[0] else -1.0 for scene in scenes])
        return (cells - cells.mean(dim=1, keepdim=True)) * lighter[:, None], way

    clean, way = coarse(0, 100)
    probe = clean[way > 0].mean(dim=0) - clean[way < 0].mean(dim=0)
    noisy, way = coarse(1, 100, torch.Generator().manual_seed(0))
    right = float(((noisy @ probe).sign() == way).float().mean())
    assert right >= 0.9, right
