"""Which clips of Shapes, the toy data set, a training or a measurement is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from animatediff.utils import UserError
from animatediff.world.camera import CAMERA, make_camera_scene
from animatediff.world.shapes import MOTIONS, Scene, make_scene, render
from animatediff.world.styles import STYLES, stamp


@dataclass(frozen=True)
class World:
    """A series of clips, numbered from 0.

    Raises:
        UserError: there is no such style or motion, or no clip at all.
    """

    clips: int  # how many
    style: str = "plain"
    watermark: bool = False
    motions: tuple[str, ...] = ()  # in turn, of the shapes or of the camera; none: of the shapes, as they are drawn
    oversampled: tuple[str, ...] = ()  # motions that a training draws more often than others
    seed: int = 0  # of the series

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise UserError(f"clips: got {self.clips}, expected at least 1")
        if self.seed < 0:
            raise UserError(f"seed: got {self.seed}, expected 0 or more")
        if self.style not in STYLES:
            raise UserError(f"style: got {self.style!r}, expected one of {', '.join(STYLES)}")
        for key in ("motions", "oversampled"):
            if unknown := sorted(set(getattr(self, key)) - {*MOTIONS, *CAMERA}):
                known = ", ".join([*MOTIONS, *CAMERA])
                raise UserError(f"{key}: got {unknown[0]!r}, expected motions of the data set: {known}")

    def said(self, text: str, numbers: Iterable[int]) -> list[str]:
        """A text of each scene in which {size}, {color}, {shape}, {motion} and {background} stand for what it shows.

        Raises:
            UserError: braces around something else.
        """
        scenes = [self.scene(i) for i in numbers]
        try:
            return [text.format_map(vars(scene) | {"motion": MOTIONS[scene.motion][0]}) for scene in scenes]
        except (KeyError, ValueError, IndexError, AttributeError):
            raise UserError(
                f"prompt: got {text!r}, expected text with {{size}}, {{color}}, {{shape}}, {{motion}} or {{background}}"
            ) from None

    def scene(self, index: int) -> Scene:
        """The exact labels of clip `index`."""
        motion = self.motions[index % len(self.motions)] if self.motions else None
        if motion in CAMERA:
            return make_camera_scene(index, motion, seed=self.seed)
        return make_scene(index, seed=self.seed, motion=motion)

    def render(self, numbers: Iterable[int]) -> tuple[Tensor, list[str]]:
        """Clips (n, 16, 3, 64, 64), range [-1, 1], and their captions."""
        scenes = [self.scene(index) for index in numbers]
        videos = render(scenes, style=STYLES[self.style])
        return stamp(videos) if self.watermark else videos, [scene.caption for scene in scenes]

    def key(self) -> str:
        """The same for worlds whose clips are the same."""
        return repr((self.clips, self.style, self.watermark, self.motions, self.seed))
