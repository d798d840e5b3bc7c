"""Frames between frames: their number, what stays as it is, loops, cuts, and that they are better than others'."""

import numpy as np
import pytest
import torch

from animatediff.media.interpolate import interpolate, moved
from animatediff.metrics.video_metrics import loop_seam
from animatediff.utils import UserError
from tests.media.interpolation import METHODS, psnr, scene_clip, score, texture_clip


def test_own_frames_stay_and_frames_are_counted():
    clip = texture_clip("pan", 0, frames=3, size=24)
    for factor in (1, 2, 4, 8):
        opened, looped = (interpolate(clip, factor, loop=loop) for loop in (False, True))
        assert len(opened) == 2 * factor + 1
        assert len(looped) == 3 * factor
        assert opened.dtype == torch.uint8
        assert torch.equal(opened[::factor], clip)
        assert torch.equal(looped[::factor], clip)
        assert torch.equal(looped[: 2 * factor], opened[:-1])


def test_a_still_clip_stays_still():
    clip = texture_clip("pan", 0, frames=1, size=32).repeat(2, 1, 1, 1)
    assert (interpolate(clip, 4).int() - clip[:1].int()).abs().max() <= 1


def test_frames_lie_where_they_belong_in_time():
    """A pan at four times the rate: each of the three frames between is the true one, and no other."""
    true = texture_clip("pan", 1, frames=25, size=48)[:9]
    made = interpolate(true[::4], 4)
    for i in (1, 2, 3, 5, 6, 7):
        others = [psnr(made[i], true[j]) for j in range(9) if j != i]
        assert psnr(made[i], true[i]) > max(others) + 3, i


def test_a_loop_is_made_across_its_seam():
    """A circle that comes back: its seam moves as evenly as the rest."""
    orbit = scene_clip("orbit", 0)
    assert len(orbit) == 31  # a whole turn has 32
    made = interpolate(orbit[::2], 2, loop=True)
    assert len(made) == 32
    assert loop_seam(made) == pytest.approx(1, abs=0.15)
    assert psnr(made[31], orbit[0]) == pytest.approx(psnr(made[1], orbit[0]), abs=3)  # as far on either side of it


def test_a_cut_is_no_fade():
    clip = torch.stack([torch.full((3, 32, 32), 10), torch.full((3, 32, 32), 240)]).to(torch.uint8)
    made = interpolate(clip, 4)
    assert made[:, 0, 0, 0].tolist() == [10, 10, 240, 240, 240]


@pytest.mark.parametrize("motion", ["left", "clockwise", "orbit"])
def test_better_than_blending_and_minterpolate(motion):
    clips = [scene_clip(motion, 0)]
    made = {name: score(clips, METHODS[name]) for name in ("blend", "its best", "ours")}
    assert made["ours"] > made["blend"] + 8
    assert made["ours"] > made["its best"] + 3


@pytest.mark.slow
def test_better_on_average_over_all_motions():
    clips = [scene_clip(motion, 1) for motion in ("up", "bounce", "grow", "shrink", "counter-clockwise", "zoom_in")]
    clips += [texture_clip(move, 5) for move in ("pan", "zoom", "roll")]
    made = {name: np.mean([score([clip], METHODS[name]) for clip in clips]) for name in METHODS}
    assert made["ours"] == max(made.values())
    assert made["ours"] > made["its best"] + 3


def test_pixels_are_looked_up_where_the_flow_says():
    frame = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moved(frame, torch.zeros(1, 2, 5, 7)), frame, atol=1e-6)
    right_and_up = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 5, 7)
    assert torch.allclose(moved(frame, right_and_up)[..., 1:, :5], frame[..., :4, 2:], atol=1e-5)
    assert torch.allclose(moved(frame, right_and_up)[..., 0, 6], frame[..., 0, 6], atol=1e-5)  # the border


def test_what_cannot_be_interpolated():
    clip = texture_clip("pan", 0, frames=2, size=16)
    with pytest.raises(UserError, match="by 3, expected one of 1, 2, 4, 8"):
        interpolate(clip, 3)
    with pytest.raises(UserError, match="single frame"):
        interpolate(clip[:1], 2)
