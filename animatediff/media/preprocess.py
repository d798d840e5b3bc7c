"""Hint images for ControlNets from pictures, as far as no learned model is needed for it.

The formulas are those of the ControlNet authors' annotators and of sd-webui-controlnet. Maps are white on black, as
ControlNets want them. OpenCV does the filtering, but for `outlines`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from animatediff.media.pictures import fit
from animatediff.media.scribble import draw_scribbles
from animatediff.utils import UserError

Picture = NDArray[np.uint8]  # (H, W, 3), RGB; maps too
FEW_COLOURS = 200  # a coloured map of fewer is a segmentation, whose colours must not be mixed


def canny(picture: Picture, *, low: float = 100, high: float = 200) -> Picture:
    """Edges of one pixel (Canny 1986): steeper than `high`, and what is steeper than `low` and touches them."""
    return _grey(_opencv().Canny(picture, low, high))


def blur(picture: Picture, *, sigma: float = 9.0) -> Picture:
    """A Gaussian blur; for tile and blur ControlNets. sigma: pixels."""
    return _opencv().GaussianBlur(picture, (0, 0), sigma)


def tile(picture: Picture, *, rate: float = 2.0) -> Picture:
    """Without details finer than `rate` pixels, which a tile ControlNet invents anew."""
    cv2, (height, width) = _opencv(), picture.shape[:2]
    small = (max(round(width / rate), 1), max(round(height / rate), 1))
    return cv2.resize(cv2.resize(picture, small, interpolation=cv2.INTER_AREA), (width, height))


def scribble(picture: Picture, *, threshold: float = 32) -> Picture:
    """Strokes where a picture is darker than around: a difference of Gaussians of 0.5 and 5 pixels (XDoG)."""
    darker = _smooth(picture, 5.0) - _smooth(picture, 0.5)
    return _grey(np.where(2 * np.clip(darker.min(axis=2), 0, 255) > threshold, 255, 0))


def lineart(picture: Picture, *, sigma: float = 6.0, floor: float = 8.0) -> Picture:
    """Soft lines of a drawing on any bright ground: how much darker than around, in units of the median line.

    sigma: pixels; floor: darkness up to which it is paper.
    """
    darker = np.clip((_smooth(picture, sigma) - picture).min(axis=2), 0, 255)
    lines = darker[darker > floor]
    median = float(np.median(lines)) if lines.size else 0.0
    return _grey(np.clip(127 * darker / max(16.0, median), 0, 255))


def outlines(picture: Picture) -> Picture:
    """Lines along the edges, as a ControlNet of this project's training has seen them (`scribble.py`); no OpenCV."""
    pixels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    return _grey(draw_scribbles(pixels)[0].numpy() * np.uint8(255))


def invert(picture: Picture) -> Picture:
    """Dark lines on white as white lines on black."""
    return 255 - picture


def threshold(picture: Picture, *, level: float = 127) -> Picture:
    """White where all channels are above `level`."""
    return _grey(np.where(picture.min(axis=2) > level, 255, 0))


PREPROCESSORS: dict[str, Callable[..., Picture]] = {
    "none": lambda picture: picture,
    "canny": canny,
    "blur": blur,
    "tile": tile,
    "scribble": scribble,
    "lineart": lineart,
    "outlines": outlines,
    "invert": invert,
    "threshold": threshold,
}


def make_hint(image: Image.Image, height: int, width: int, *, how: str = "none", **settings: float) -> Picture:
    """A hint image of a clip's size: cropped around the centre, resized, then filtered.

    Args:
        image: transparent parts count as white.
        how: one of PREPROCESSORS; "none" for maps that are made already.
        settings: of the preprocessor, such as `low` and `high` of canny.

    Raises:
        UserError: an unknown preprocessor or setting, or OpenCV is not installed.
    """
    if how not in PREPROCESSORS:
        raise UserError(f"preprocessor: got {how!r}, expected one of {', '.join(PREPROCESSORS)}")
    known = PREPROCESSORS[how].__kwdefaults__ or {}
    if unknown := sorted(settings.keys() - known.keys()):
        expected = f"one of {', '.join(known)}" if known else "none"
        raise UserError(f"preprocessor {how}: got the setting {unknown[0]!r}, expected {expected}")
    fitted = _fit_map(_on_white(image), height, width) if how == "none" else fit(_on_white(image), height, width)
    return PREPROCESSORS[how](np.asarray(fitted), **settings)


def _fit_map(image: Image.Image, height: int, width: int) -> Image.Image:
    """As `fit`; of a segmentation no colours are mixed."""
    if image.size == (width, height):
        return image
    few = image.getcolors(FEW_COLOURS - 1) or []
    coloured = any(len(set(colour)) > 1 for _, colour in few)
    return fit(image, height, width, Image.Resampling.NEAREST if coloured else Image.Resampling.BILINEAR)


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _smooth(picture: Picture, sigma: float) -> NDArray[np.float32]:
    return _opencv().GaussianBlur(picture.astype(np.float32), (0, 0), sigma)


def _grey(levels: NDArray) -> Picture:
    """(H, W) as three equal channels."""
    return np.repeat(levels.astype(np.uint8)[:, :, None], 3, axis=2)


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError:
        raise UserError(
            "preprocessor: got no OpenCV, which filters the pictures: `pip install opencv-python-headless` (the extra "
            "`hints`), or give finished maps and `preprocessor: none`"
        ) from None
    return cv2
