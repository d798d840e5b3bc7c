"""The scorer reads rendered and degraded clips right, and gives nothing for shuffled frames, jitter or noise."""

import csv
import json
from collections import Counter
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from animatediff.utils import UserError
from animatediff.world import read as shapes_scorer
from animatediff.world import shapes
from animatediff.world.evaluate import evaluate_shapes, shuffle_frames
from animatediff.world.read import LABELS, NONE, OPPOSITES, Score, score_clip, score_clips
from animatediff.world.read_hint import read_hint
from animatediff.world.report import format_table, summarise
from animatediff.world.series import World
from animatediff.world.shapes import FRAMES, MOTIONS, SIZE, SPINS, make_scene, poses, render
from animatediff.world.styles import STYLES, stamp

HELD_OUT = 1


def balanced(count: int, *, first: int = 0, **labels: str) -> list[shapes.Scene]:
    names = list(MOTIONS)
    return [make_scene(first + i, seed=HELD_OUT, **({"motion": names[i % 10]} | labels)) for i in range(count)]


def blurred(videos: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-torch.arange(-3, 4).float().square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = F.pad(videos.reshape(-1, 1, SIZE, SIZE), (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None]).reshape(videos.shape)


def jittered(videos: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    """Every frame moved on its own, by a normal distance of this deviation in x and in y."""
    frames = videos.flatten(0, 1)
    theta = torch.eye(2, 3).repeat(len(frames), 1, 1)
    theta[:, :, 2] = torch.randn(len(frames), 2, generator=generator) * pixels / (SIZE / 2)
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False)
    return F.grid_sample(frames, grid, align_corners=False, padding_mode="border").reshape(videos.shape)


def degraded(videos: Tensor) -> Tensor:
    """As a small generative model draws: soft, noisy, a little restless."""
    generator = torch.Generator().manual_seed(0)
    videos = jittered(blurred(videos, 0.8), 0.7, generator)
    return (videos + 0.03 * torch.randn(videos.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    return balanced(200)


@pytest.fixture(scope="module")
def videos(scenes) -> Tensor:
    return render(scenes)


def test_rendered_clips(videos, scenes):
    summary = summarise(score_clips(videos), scenes)
    assert min(summary[label] for label in LABELS) >= 99, summary
    assert summary["smoothness"] > 0.9 and summary["flicker"] < 0.002 and summary["drift"] < 0.01


@pytest.mark.slow
def test_hints_of_single_frames():
    scenes = [make_scene(i, seed=HELD_OUT, motion=list(MOTIONS)[i % 10]) for i in range(50)]
    frames = render(scenes, only_frames=np.arange(50)[:, None] % FRAMES)
    for some in (frames, degraded(frames)):
        read = [read_hint(frame) for frame in some[:, 0]]
        assert sum(a == scene.motion for a, scene in zip(read, scenes, strict=True)) >= 49, read
    assert read_hint(torch.zeros(3, SIZE, SIZE)) == NONE


@pytest.mark.slow
def test_degraded_clips(videos, scenes):
    summary = summarise(score_clips(degraded(videos[:50])), scenes[:50])
    assert min(summary[label] for label in LABELS) >= 97, summary


@pytest.mark.parametrize("amplitude", [0.6, 1.2])
def test_smaller_and_larger_motions(amplitude, monkeypatch):
    def scaled(scene: shapes.Scene) -> np.ndarray:
        path = poses(scene)
        path[:, 2] = np.log(path[:, 2])
        still = path[4] if scene.motion == "bounce" else path.mean(axis=0)
        path = still + amplitude * (path - still)
        path[:, 2] = np.exp(path[:, 2])
        return path

    monkeypatch.setattr(shapes, "poses", scaled)
    some = balanced(20, first=200)
    scores = score_clips(degraded(render(some)))
    for score, scene in zip(scores, some, strict=True):
        assert score.matches(scene)["motion"], (scene, score)
    amplitudes = [cell["amplitude"] for cell in summarise(scores, some)["by_motion"].values()]
    assert amplitudes[1:] == pytest.approx([amplitude] * 9, rel=0.2) and amplitudes[0] is None


def test_played_backwards(videos, scenes):
    other = OPPOSITES | {backwards: name for name, backwards in OPPOSITES.items()}
    for score, scene in zip(score_clips(videos[:20].flip(1)), scenes, strict=False):
        assert score.motion == other.get(scene.motion, scene.motion), scene


def test_shuffled_frames_have_no_motion(videos, scenes):
    """Only what stands still survives: one in ten."""
    scores = score_clips(shuffle_frames(videos[100:160]))
    moving = [score.motion for score, scene in zip(scores, scenes[100:160], strict=True) if scene.motion != "still"]
    assert Counter(moving)[NONE] >= 0.97 * len(moving), Counter(moving)
    summary = summarise(scores, scenes[100:160])
    assert summary["motion"] <= 15 and summary["by_motion"]["still"]["motion"] == 100
    assert min(summary[label] for label in ("color", "shape", "background")) >= 99


def test_independent_frames_have_no_motion():
    """As an image model makes them: each frame right, each elsewhere."""
    motions, clips, rng = list(MOTIONS) * 2, [], np.random.default_rng(0)
    for i, motion in enumerate(motions):
        frames = [
            make_scene(1000 * i + k, seed=HELD_OUT, motion=motion, color="red", shape="star", background="white")
            for k in range(FRAMES)
        ]
        clips.append(render(frames, only_frames=rng.integers(FRAMES, size=(FRAMES, 1)))[:, 0])
    read = [score.motion for score in score_clips(torch.stack(clips))]
    assert sum(a == b for a, b in zip(read, motions, strict=True)) <= 0.15 * len(motions), read


def test_jitter_is_no_motion(videos, scenes):
    still = videos[[scene.motion == "still" for scene in scenes]][:10]
    generator = torch.Generator().manual_seed(1)
    for pixels in (2.5, 5.0):
        assert {score.motion for score in score_clips(jittered(still, pixels, generator))} == {NONE}


def test_one_jump_is_no_motion(videos, scenes):
    held = videos[:30, torch.arange(FRAMES) // 8 * 15]
    for score, scene in zip(score_clips(held), scenes, strict=False):
        assert score.motion == scene.motion == "still" or score.motion in (NONE, "still"), scene


def test_smoothness_falls_with_jitter(videos):
    few, generator = videos[:10], torch.Generator().manual_seed(2)
    means = [np.mean([s.smoothness for s in score_clips(jittered(few, p, generator))]) for p in (0.0, 0.5, 1.0)]
    assert means[0] > 0.9 and means[1] == pytest.approx(1 / (1 + 0.5 * 2**0.5), abs=0.08) and means[2] < means[1]


def test_a_change_of_colour_is_drift():
    red, blue = (render(balanced(1, motion="still", color=color))[0] for color in ("red", "blue"))
    score = score_clip(torch.cat([red[:12], blue[12:]]))
    assert score.color == NONE or score.drift == pytest.approx(0.25)


def test_bounces_loop():
    """What spins is half a turn further at the end, which not every shape shows."""
    for score, motion in zip(score_clips(render(balanced(10))), MOTIONS, strict=True):
        if motion == "still":
            assert score.seam is None
        elif motion not in SPINS:
            assert (score.seam <= 1.05) == (motion == "bounce"), motion


def test_flicker_is_of_the_background(videos):
    noisy = videos[0] + 0.05 * torch.randn(videos[0].shape, generator=torch.Generator().manual_seed(3))
    assert score_clip(videos[0]).flicker < 1e-3 < 0.03 < score_clip(noisy).flicker


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(FRAMES, 3, SIZE, SIZE),
        torch.ones(FRAMES, 3, SIZE, SIZE),
        torch.randn(FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),
        torch.tensor([220.0, 40.0, 40.0]).div(127.5).sub(1)[None, :, None, None].expand(FRAMES, 3, SIZE, SIZE),
    ],
    ids=["gray", "white", "noise", "red all over"],
)
def test_what_is_no_clip_has_no_shape_and_no_motion(video):
    score = score_clip(video)
    assert (score.shape, score.motion) == (NONE, NONE)
    assert not any(score.matches(make_scene(0, motion="still", shape="circle"))[label] for label in ("shape", "motion"))


def test_refused_clips():
    with pytest.raises(UserError, match=r"\(8, 3, 64, 64\), expected \(16, 3, 64, 64\)"):
        score_clip(torch.zeros(8, 3, SIZE, SIZE))
    with pytest.raises(UserError, match="not finite"):
        score_clip(torch.full((FRAMES, 3, SIZE, SIZE), torch.nan))


def test_summary():
    scene = make_scene(0, motion="left")
    good = Score(scene.color, scene.shape, scene.background, "left", "left", {"right": -0.9}, 0.8, 0.0, 0.1, 0.0, None)
    bad = Score(scene.color, NONE, scene.background, "right", "none", {"right": 0.5}, 0.4, 0.2, 0.1, 0.5, 3.0)
    summary = summarise([good, bad], [scene, scene])
    assert [summary[key] for key in ("clips", *LABELS, "all", "place")] == [2, 100, 50, 100, 50, 50, 50]
    assert (summary["smoothness"], summary["flicker"], summary["drift"]) == pytest.approx((0.6, 0.1, 0.25))
    assert summary["seam"] == 3  # of the clip that has one
    assert summarise([good], [scene])["seam"] is None
    left = {"clips": 2, "motion": 50.0, "amplitude": 0.2, "read_as": {"left": 1, "right": 1}}
    assert summary["by_motion"] == {"left": left}
    table = format_table({"generated": summary}).splitlines()
    assert table[0].split() == ["generated"] and table[-1].split() == ["left", "%", "50.0"]


def test_evaluation_of_a_perfect_model(tmp_path):
    asked: list[str] = []

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        scenes = [make_scene(seed, seed=HELD_OUT, motion=list(MOTIONS)[seed % 10]) for seed in seeds]
        assert captions == [scene.caption for scene in scenes]
        asked.extend(captions)
        return render(scenes)

    result = evaluate_shapes(generate, captions=11, batch=4, output_dir=tmp_path, settings={"steps": 25})
    assert len(asked) == 11
    difference = result["generated"].pop("difference")
    assert result["generated"] == result["rendered"] and set(difference.values()) == {0.0}
    assert list(difference) == ["all", *map(str, range(FRAMES))]
    result["generated"]["difference"] = difference
    assert result["generated"]["all"] == result["generated"]["place"] == 100
    assert result["shuffled"]["motion"] == pytest.approx(100 * 2 / 11, abs=0.01)  # two stand still
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert result["settings"] == {"captions": 11, "seed": 1, "style": "plain", "steps": 25}
    assert (result["generated"]["style"], result["generated"]["watermark"]) == (100, 0)
    rows = list(csv.DictReader((tmp_path / "clips.csv").open()))
    assert [row["caption"] for row in rows] == asked
    assert all(row["motion"] == row["read_motion"] for row in rows) and rows[1]["read_motion_shuffled"] == NONE
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width >= FRAMES * SIZE and sheet.height >= 10 * SIZE  # a row for each motion
        assert sheet.height < 11 * (SIZE + 24)


def test_evaluation_of_a_style():
    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        scenes = [make_scene(seed, seed=HELD_OUT, motion=list(MOTIONS)[seed % 10]) for seed in seeds]
        return stamp(render(scenes, style=STYLES["neon" if seeds[0] < 2 else "plain"]))

    result = evaluate_shapes(generate, captions=4, batch=2, style="neon")
    assert result["rendered"]["all"] == result["rendered"]["style"] == 100 and result["rendered"]["watermark"] == 0
    assert (result["generated"]["style"], result["generated"]["watermark"]) == (50, 100)
    assert result["generated"]["difference"]["all"] > 0.1  # two of the clips are of another style
    lines = [line.split() for line in format_table({"a": result["generated"]}).splitlines()]
    assert ["style", "%", "50.0"] in lines and ["watermark", "%", "100.0"] in lines


def test_evaluation_of_camera_moves():
    world = World(6, motions=("zoom_in", "zoom_out", "orbit"), seed=HELD_OUT)
    result = evaluate_shapes(lambda captions, seeds: world.render(seeds)[0], captions=6, motions=world.motions)
    assert result["generated"]["motion"] == 100 and result["shuffled"]["motion"] == 0
    found = result["generated"]["by_motion"]
    assert found["zoom_out"] == {"clips": 2, "motion": 100.0, "amplitude": ANY, "read_as": {"zoom_out": 2}}
    assert all(found[motion]["amplitude"] == pytest.approx(1, abs=0.1) for motion in world.motions)
    assert result["generated"]["amplitudes"]["zoom_in"] == pytest.approx(0, abs=0.1)  # in, out, and not at all


def test_place_and_size_can_be_read_where_the_turn_cannot():
    path = poses(make_scene(3, motion="grow"))
    path[:, 2], path[:, 3] = np.log(path[:, 2]), np.random.default_rng(0).uniform(0, 6, FRAMES)
    even = np.full(FRAMES, 1 / FRAMES)
    read = [shapes_scorer._read_motion(path, even, turns=1.0, channels=channels)[0] for channels in (4, 3)]
    assert read == [NONE, "grow"]


def test_refused_evaluations():
    with pytest.raises(UserError, match="style: got 'oil', expected one of plain"):
        evaluate_shapes(lambda captions, seeds: torch.zeros(0), captions=1, style="oil")
    with pytest.raises(UserError, match="0 captions"):
        evaluate_shapes(lambda captions, seeds: torch.zeros(0), captions=0)
    with pytest.raises(UserError, match="1 clips for 2 captions"):
        evaluate_shapes(lambda captions, seeds: torch.zeros(1, FRAMES, 3, SIZE, SIZE), captions=2)
