"""Motions of the camera in Shapes, the toy data set, which its models do not know: what a MotionLoRA is to learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from animatediff.world.shapes import MOTIONS, SIZE, Scene, make_scene

CAMERA: dict[str, tuple[str, ...]] = {
    "zoom_in": ("zooming in", "camera zooming in"),
    "zoom_out": ("zooming out", "camera zooming out"),
    "orbit": ("orbiting", "camera orbiting"),
}
FROM_MIDDLE = {"zoom_in": (8.0, 10.0), "zoom_out": (8.0, 10.0), "orbit": (0.0, 8.0)}  # pixels to the shape, on average


def make_camera_scene(index: int, motion: str, *, seed: int = 0) -> Scene:
    """Scene `index` of the series `seed`, whose shape stands still while the camera moves over the whole picture.

    Args:
        motion: a key of CAMERA. A zoom doubles or halves everything, also the way to the picture's middle; an orbit
            moves the picture once around a small circle, without turning it.
    """
    scene = make_scene(index, seed=seed, motion="still")
    rng = np.random.Generator(np.random.PCG64([seed, index, 1]))
    said = next(words for words in MOTIONS["still"] if words in scene.caption)
    words = CAMERA[motion][int(rng.integers(len(CAMERA[motion])))]
    caption = scene.caption.replace(said, words)
    way, angle = rng.uniform(*FROM_MIDDLE[motion]), rng.uniform(0, 2 * np.pi)
    x, y = (SIZE / 2 + way * float(part) for part in (np.cos(angle), np.sin(angle)))
    return replace(scene, motion=motion, caption=caption, x=x, y=y, angle=0.0)
