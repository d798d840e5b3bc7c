"""Camera moves on a picture whose pixels say where they are."""

import math

import pytest
import torch

from animatediff.training.data.virtual_camera import CAMERA_MOVES, MARGIN, ROLL, margin_size, move_camera

SIZE = (32, 48)


@pytest.fixture(scope="module")
def still() -> torch.Tensor:
    """(9, 2, 48, 72): channel 0 is x, channel 1 y, in pixels from the middle."""
    height, width = margin_size(SIZE)
    y = torch.arange(height) - (height - 1) / 2
    x = torch.arange(width) - (width - 1) / 2
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).expand(9, -1, -1, -1)


def steps(clip: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every frame, where the window's middle is, how wide a pixel of it is, and its angle; y points down."""
    dx, dy = ((clip[:, i, :, -1] - clip[:, i, :, 0]).mean(1) / (SIZE[1] - 1) for i in (0, 1))
    x, y = clip.mean(dim=(2, 3)).T
    return {"x": x, "y": y, "scale": torch.hypot(dx, dy), "angle": torch.atan2(dy, dx)}


ROOM = {"x": 24.0, "y": 16.0, "scale": MARGIN - 1, "angle": 2 * ROLL}  # from the first frame to the last


@pytest.mark.parametrize(
    ("move", "what", "sign"),
    [
        ("zoom_in", "scale", -1),
        ("zoom_out", "scale", 1),
        ("pan_left", "x", -1),
        ("pan_right", "x", 1),
        ("tilt_up", "y", -1),
        ("tilt_down", "y", 1),
        ("roll_clockwise", "angle", 1),
        ("roll_anticlockwise", "angle", -1),
    ],
)
def test_the_window_moves_evenly_and_in_one_way(still, move, what, sign):
    found = steps(move_camera(still, move, SIZE))
    moved = found.pop(what)
    assert (sign * moved.diff() > 0).all()
    assert abs(moved[-1] - moved[0]) == pytest.approx(ROOM[what], rel=0.02)
    assert all(torch.allclose(values, values[:1], atol=1e-3) for values in found.values())


def test_every_move_is_tested_and_one_frame_is_enough(still):
    assert len(CAMERA_MOVES) == 8
    for move in CAMERA_MOVES:
        clip = move_camera(still[:1], move, SIZE)
        assert clip.shape == (1, 2, *SIZE) and clip.mean(dim=(0, 2, 3)).abs().max() < 0.01


def test_a_rolling_window_stays_inside():
    """Up to 2:1, of either orientation."""
    for width, height in ((1, 1), (2, 1), (1, 2)):
        assert width * math.cos(ROLL) + height * math.sin(ROLL) <= MARGIN * width
        assert width * math.sin(ROLL) + height * math.cos(ROLL) <= MARGIN * height
