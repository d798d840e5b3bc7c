"""Reads the camera's motions of Shapes, the toy data set, back from a clip: zooms and orbits of the whole picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from animatediff.world.read import (
    CALM_MOVING,
    MIN_AMPLITUDE,
    MIN_FIT,
    NONE,
    body_of,
    checked,
    explain,
    read_background,
    read_color,
    read_path,
    visible,
)
from animatediff.world.shapes import FRAMES, ORBIT, SIZE, ZOOM

ZOOMED = np.linspace(-0.5, 0.5, FRAMES) * np.log(ZOOM)  # log radius of every frame of a zoom in


def read_camera(video: Tensor) -> str:
    """The key of `camera.CAMERA` that a clip (16, 3, 64, 64), range [-1, 1], shows, or "none".

    As strict as `score_clip`: what moves otherwise, or restlessly, is none. Shapes that grow or shrink where they are
    do not zoom: a zoom moves them away from the picture's middle or towards it, in proportion.
    """
    path = _read_path(video)
    return NONE if path is None else _read_zoom(path) or _read_orbit(path) or NONE


def camera_amplitudes(video: Tensor) -> dict[str, float]:
    """How much a clip (16, 3, 64, 64), range [-1, 1], zooms in and orbits, over the true amounts; both may be there.

    A zoom out is a negative zoom in. 0 where no shape can be seen.
    """
    path = _read_path(video)
    if path is None:
        return {"zoom_in": 0.0, "orbit": 0.0}
    return {"zoom_in": explain(path[:, 2], ZOOMED)[0], "orbit": abs(_circle(path)[0]) / ORBIT}


@torch.no_grad()
def _read_path(video: Tensor) -> np.ndarray | None:
    """x, y, log radius and angle (f, 4) of the shape."""
    pixels = (checked(video) + 1) * 127.5
    _, background, _ = read_background(pixels)
    color, rgb, _ = read_color(pixels)
    body = body_of(pixels, rgb, background)
    return read_path(body)[2] if color != NONE and visible(body) else None


def _read_zoom(path: np.ndarray) -> str | None:
    amplitude, fit = explain(path[:, 2], ZOOMED)
    if abs(amplitude) < MIN_AMPLITUDE or fit < MIN_FIT:
        return None
    from_middle = path[:, :2] - SIZE / 2
    factor = np.exp(amplitude * ZOOMED)
    zoomed = from_middle - factor[:, None] * (factor @ from_middle / (factor @ factor))
    stayed = from_middle - from_middle.mean(axis=0)
    uneven = (zoomed.std(axis=0) > CALM_MOVING[:2]).any() or (path[:, 2] - amplitude * ZOOMED).std() > CALM_MOVING[2]
    if uneven or np.square(zoomed).sum() > 0.5 * np.square(stayed).sum():
        return None
    return "zoom_in" if amplitude > 0 else "zoom_out"


def _read_orbit(path: np.ndarray) -> str | None:
    radius, fit = _circle(path)
    calm = path[:, 2].std() <= CALM_MOVING[2]
    return "orbit" if calm and fit >= MIN_FIT and abs(radius) >= MIN_AMPLITUDE * ORBIT else None


def _circle(path: np.ndarray) -> tuple[complex, float]:
    """Radius, as a vector to frame 0, of the circle that is passed once, and the share of the movement it explains."""
    place = path[:, 0] + 1j * path[:, 1]
    place = place - place.mean()
    turn = np.exp(2j * np.pi * np.arange(FRAMES) / FRAMES)
    radius = np.vdot(turn, place) / FRAMES  # clockwise: y points down
    return radius, abs(radius) ** 2 / max(float(np.mean(np.abs(place) ** 2)), 1e-9)
