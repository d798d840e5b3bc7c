"""Where the camera is in every frame: pose files in RealEstate10K's form, named moves, and both as rays of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.utils import UserError

WIDE = 1280 / 720  # of RealEstate10K's videos
LENS = (0.4748, 0.8441, 0.5, 0.5)  # fx, fy over width and height, and the middle
TURN, WAY = math.pi / 3, 1.5  # of a move, in the 16 frames that CameraCtrl was trained on
FRAMES = 16
# name -> turns about the axes, and the camera's way along them: x right, y down, z into the picture. Directions are
# the camera's: the picture moves or turns the other way.
MOVES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "zoom_in": ((0, 0, 0), (0, 0, 2)),
    "zoom_out": ((0, 0, 0), (0, 0, -2)),
    "pan_left": ((0, 0, 0), (-1, 0, 0)),
    "pan_right": ((0, 0, 0), (1, 0, 0)),
    "tilt_up": ((1, 0, 0), (0, 0, 0)),
    "tilt_down": ((-1, 0, 0), (0, 0, 0)),
    "roll_clockwise": ((0, 0, 1), (0, 0, 0)),
    "roll_anticlockwise": ((0, 0, -1), (0, 0, 0)),
}


@dataclass(frozen=True)
class CameraPath:
    """A camera in every frame of a clip.

    Attributes:
        intrinsics: (f, 4), fx, fy, cx, cy as fractions of the width and height of a picture of `aspect`.
        camera_to_world: (f, 4, 4); x right, y down, z into the picture.
        aspect: width over height of the pictures that the intrinsics belong to.
    """

    intrinsics: Tensor
    camera_to_world: Tensor
    aspect: float = WIDE

    def __len__(self) -> int:
        return len(self.intrinsics)

    def of(self, frames: Tensor) -> CameraPath:
        """Of some frames of the clip."""
        return CameraPath(self.intrinsics[frames], self.camera_to_world[frames], self.aspect)


def read_camera_path(path: str | Path) -> CameraPath:
    """Read a pose file: a line with a URL, then one for each frame of 19 numbers.

    These are a timestamp, fx, fy, cx, cy as fractions, two zeros (or the width and height of the video), and the 3x4
    world-to-camera matrix row by row.

    Raises:
        UserError: no such file, no frames in it, or a line of something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"got {path}, expected a file of camera poses: there is no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()[1:], start=2):
        if line.strip():
            rows.append(_numbers(line, f"{path}, line {number}"))
    if not rows:
        raise UserError(f"got {path} without poses, expected a URL in its first line and then a line for each frame")
    table = torch.tensor(rows, dtype=torch.float64)
    world_to_camera = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    world_to_camera[:, :3] = table[:, 7:].view(-1, 3, 4)
    width, height = table[0, 5:7].tolist()
    return CameraPath(table[:, 1:5], world_to_camera.inverse(), width / height if width > 0 and height > 0 else WIDE)


def move_path(moves: Sequence[str], frames: int, *, speed: float = 1.0) -> CameraPath:
    """A camera that makes one or several of MOVES at once, evenly, from the first frame on.

    Args:
        speed: 1: a turn of 60 degrees, or 1.5 units of way (3 of a zoom), in 16 frames.

    Raises:
        UserError: an unknown move.
    """
    if unknown := [move for move in moves if move not in MOVES]:
        raise UserError(f"got the camera move {unknown[0]!r}, expected one of {', '.join(MOVES)}")
    turns, ways = (torch.tensor([MOVES[m][i] for m in moves], dtype=torch.float64).sum(0) for i in (0, 1))
    done = speed * torch.arange(frames, dtype=torch.float64) / FRAMES
    camera_to_world = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    x, y, z = (_turn(axis, done * TURN * turns[axis]) for axis in range(3))
    camera_to_world[:, :3, :3] = z @ y @ x
    camera_to_world[:, :3, 3] = done[:, None] * WAY * ways
    return CameraPath(torch.tensor(LENS, dtype=torch.float64).repeat(frames, 1), camera_to_world)


def plucker_embedding(path: CameraPath, height: int, width: int) -> Tensor:
    """The ray of every pixel relative to the first frame's camera: origin x direction, direction (Plücker).

    Returns:
        float32 (f, 6, height, width). A clip is a centre crop of the path's pictures; ways have the path's unit.
    """
    fx, fy, cx, cy = path.intrinsics.unbind(1)
    if path.aspect > width / height:
        fx = fx * height * path.aspect / width
    else:
        fy = fy * width / path.aspect / height
    u = (torch.arange(width, dtype=torch.float64) + 0.5)[None, None, :] - (cx * width)[:, None, None]
    v = (torch.arange(height, dtype=torch.float64) + 0.5)[None, :, None] - (cy * height)[:, None, None]
    u, v = torch.broadcast_tensors(u / (fx * width)[:, None, None], v / (fy * height)[:, None, None])
    poses = path.camera_to_world[:1].inverse() @ path.camera_to_world
    rays = F.normalize(torch.stack([u, v, torch.ones_like(u)], dim=-1), dim=-1)
    directions = torch.einsum("fij,fhwj->fhwi", poses[:, :3, :3], rays)
    origins = poses[:, None, None, :3, 3].expand_as(directions)
    moments = torch.linalg.cross(origins, directions, dim=-1)
    return torch.cat([moments, directions], dim=-1).permute(0, 3, 1, 2).float().contiguous()


def _turn(axis: int, angle: Tensor) -> Tensor:
    """Rotations (f, 3, 3) about an axis; a positive angle turns the next axis to the one after it."""
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3, dtype=angle.dtype).repeat(len(angle), 1, 1)
    matrix[:, a, a], matrix[:, a, b] = angle.cos(), -angle.sin()
    matrix[:, b, a], matrix[:, b, b] = angle.sin(), angle.cos()
    return matrix


def _numbers(line: str, where: str) -> list[float]:
    words = line.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) != 19 or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"{where}: got {line[:40]!r}, expected 19 numbers: timestamp, fx fy cx cy, 0 0, and a 3x4 matrix"
        )
    return numbers
