"""Other looks of Shapes, the toy data set: the same scenes in three styles, and a watermark as of stock videos."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.world.shapes import PLAIN, SIZE, Style, cover, over

NIGHT = 0.3  # what is left of a background's brightness under neon light
HATCH = 8.0  # pixels along x + y from one stroke to the next
PASTEL = 0.45  # share of white in a pastel colour
BLOCK = 4  # pixels, both sides


class Neon(Style):
    """A glowing outline at night; the mark is a lamp."""

    def palette(self, color: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        return color, NIGHT * background

    def body(self, canvas: Tensor, color: Tensor, distance: Tensor, mark: Tensor) -> Tensor:
        canvas = over(canvas, torch.full_like(color, 0.02), cover(distance))
        canvas = over(canvas, color, 0.5 * torch.exp(-distance.abs() / 2))
        canvas = over(canvas, color, cover(distance.abs() - 1.3))
        return over(canvas, torch.full_like(color, 0.95), cover(mark))


class Hatched(Style):
    """Diagonal pale strokes over every shape."""

    def body(self, canvas: Tensor, color: Tensor, distance: Tensor, mark: Tensor) -> Tensor:
        canvas = over(canvas, color, cover(distance))
        canvas = over(canvas, 0.25 * color + 0.75, cover(distance) * strokes())
        return over(canvas, torch.full_like(color, 0.07), cover(mark))


class Pixelated(Style):
    """Pale colours in square blocks."""

    def finish(self, canvas: Tensor) -> Tensor:
        pale = (canvas + PASTEL * (1 - canvas)).flatten(0, 1)
        blocks = F.interpolate(F.avg_pool2d(pale, BLOCK), scale_factor=BLOCK, mode="nearest")
        return blocks.reshape(canvas.shape)


STYLES: dict[str, Style] = {"plain": PLAIN, "neon": Neon(), "hatched": Hatched(), "pixelated": Pixelated()}


def strokes() -> Tensor:
    """Coverage (SIZE, SIZE) of the hatching, which stays where it is while shapes move."""
    grid = torch.arange(SIZE) + 0.5
    wave = torch.cos((grid[:, None] + grid) * (2 * torch.pi / HATCH))
    return (0.05 + 1.5 * wave).clamp(0, 1)


# ---- watermark

WORD = (
    "#### #### #### #### #..#",
    "#... .##. #..# #... #.#.",
    "#### .##. #..# #... ##..",
    "...# .##. #..# #... #.#.",
    "#### .##. #### #### #..#",
)
STAMP_AT = (44, 8)  # row and column of the word's upper left corner
STAMP_SCALE = 2  # pixels to a cell of WORD
BAND, LETTERS = 0.35, 0.6  # opacities of the dark band and of the white letters


@lru_cache(maxsize=1)
def watermark() -> tuple[Tensor, Tensor]:
    """Where the band and the letters are, (SIZE, SIZE) in {0, 1}."""
    cells = torch.tensor([[letter == "#" for letter in row] for row in WORD]).float()
    letters, band = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
    large = cells.repeat_interleave(STAMP_SCALE, 0).repeat_interleave(STAMP_SCALE, 1)
    (top, left), (height, width) = STAMP_AT, large.shape
    letters[top : top + height, left : left + width] = large
    band[top - 2 : top + height + 2] = 1
    return band, letters


def stamp(videos: Tensor) -> Tensor:
    """Clips (..., 3, SIZE, SIZE), range [-1, 1], under the same translucent word at the same place, as WebVid's."""
    band, letters = watermark()
    videos = videos + (-1 - videos) * (BAND * band)
    return videos + (1 - videos) * (LETTERS * letters)
