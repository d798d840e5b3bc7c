"""Camera moves from ordinary clips: a window that wanders over the frames (AnimateDiff, arXiv 2307.04725, sec. 4.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 1.5  # sides of the frames over sides of the window: the room a camera has
ROLL = math.radians(15)  # to both sides; the window stays inside the frames up to an aspect of 2:1

# name -> zoom, pan, tilt, roll: 1, -1, or 0 where the camera does not. Directions are the camera's: the picture moves
# or turns the other way.
CAMERA_MOVES: dict[str, tuple[int, int, int, int]] = {
    "zoom_in": (1, 0, 0, 0),
    "zoom_out": (-1, 0, 0, 0),
    "pan_left": (0, -1, 0, 0),
    "pan_right": (0, 1, 0, 0),
    "tilt_up": (0, 0, -1, 0),
    "tilt_down": (0, 0, 1, 0),
    "roll_clockwise": (0, 0, 0, 1),
    "roll_anticlockwise": (0, 0, 0, -1),
}


def margin_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the frames that `move_camera` needs for a clip of height and width `size`."""
    return round(MARGIN * size[0]), round(MARGIN * size[1])


def move_camera(video: Tensor, move: str, size: tuple[int, int]) -> Tensor:
    """The clip that a moving camera sees: along time its window shrinks, grows, slides or turns evenly.

    Args:
        video: (f, c, H, W), where (H, W) is `margin_size(size)`.
        move: a key of CAMERA_MOVES.
        size: height and width (h, w) of the result.

    Returns:
        (f, c, h, w), each pixel interpolated between four.
    """
    zoom, pan, tilt, roll = CAMERA_MOVES[move]
    path = torch.linspace(-1, 1, len(video)) if len(video) > 1 else torch.zeros(1)
    small = 1 / MARGIN
    scale = small ** ((1 + zoom * path) / 2) if zoom else torch.full_like(path, small)
    angle = roll * ROLL * path
    aspect = size[1] / size[0]
    rows = [
        [scale * angle.cos(), -scale * angle.sin() / aspect, pan * path * (1 - small)],
        [scale * angle.sin() * aspect, scale * angle.cos(), tilt * path * (1 - small)],
    ]  # from the window's coordinates, -1 … 1, to those of the frame
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2).to(video)
    grid = F.affine_grid(matrix, [len(video), video.shape[1], *size], align_corners=False)
    return F.grid_sample(video, grid, mode="bilinear", padding_mode="border", align_corners=False)
