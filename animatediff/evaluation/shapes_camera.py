"""Reads the camera's motions of the built-in world back from a clip: zooms and orbits of the whole picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from animatediff.data.shapes import FRAMES, ORBIT, SIZE, ZOOM
from animatediff.evaluation.shapes import (
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


@torch.no_grad()
def read_camera(video: Tensor) -> str:
    """The key of `data.shapes_camera.CAMERA` that a clip (16, 3, 64, 64), range [-1, 1], shows, or "none".

    As strict as `score_clip`: what moves otherwise, or restlessly, is none. Shapes that grow or shrink where they are
    do not zoom: a zoom moves them away from the picture's middle or towards it, in proportion.
    """
    pixels = (checked(video) + 1) * 127.5
    _, background, _ = read_background(pixels)
    color, rgb, _ = read_color(pixels)
    body = body_of(pixels, rgb, background)
    if color == NONE or not visible(body):
        return NONE
    path = read_path(body)[2]
    return _read_zoom(path) or _read_orbit(path) or NONE


def _read_zoom(path: np.ndarray) -> str | None:
    """path: x, y, log radius and angle (f, 4)."""
    time = np.linspace(-0.5, 0.5, FRAMES) * np.log(ZOOM)
    amplitude, fit = explain(path[:, 2], time)
    if abs(amplitude) < MIN_AMPLITUDE or fit < MIN_FIT:
        return None
    from_middle = path[:, :2] - SIZE / 2
    factor = np.exp(amplitude * time)
    zoomed = from_middle - factor[:, None] * (factor @ from_middle / (factor @ factor))
    stayed = from_middle - from_middle.mean(axis=0)
    uneven = (zoomed.std(axis=0) > CALM_MOVING[:2]).any() or (path[:, 2] - amplitude * time).std() > CALM_MOVING[2]
    if uneven or np.square(zoomed).sum() > 0.5 * np.square(stayed).sum():
        return None
    return "zoom_in" if amplitude > 0 else "zoom_out"


def _read_orbit(path: np.ndarray) -> str | None:
    place = path[:, 0] + 1j * path[:, 1]
    place = place - place.mean()
    turn = np.exp(2j * np.pi * np.arange(FRAMES) / FRAMES)
    radius = np.vdot(turn, place) / FRAMES  # clockwise: y points down
    fit = abs(radius) ** 2 / max(float(np.mean(np.abs(place) ** 2)), 1e-9)
    calm = path[:, 2].std() <= CALM_MOVING[2]
    return "orbit" if calm and fit >= MIN_FIT and abs(radius) >= MIN_AMPLITUDE * ORBIT else None
