"""Pictures and clips that a user gives, cropped and resized to a clip's size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from animatediff.utils import UserError


def crop_box(size: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """The largest part in the middle of a picture that has a wanted shape: left, top, right, bottom in pixels.

    Args:
        size: width and height of the picture.
        aspect: width / height of the part.
    """
    width, height = size
    wide = width / height > aspect
    w = max(round(height * aspect), 1) if wide else width
    h = height if wide else max(round(width / aspect), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def fit(
    picture: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """A picture of `height` and `width`, by a centre crop to their aspect and resizing, bilinear as officially."""
    cropped = picture.crop(crop_box(picture.size, width / height))
    return cropped.resize((width, height), resample)


def fit_frames(frames: Sequence[Image.Image] | np.ndarray, height: int, width: int, *, mode: str = "RGB") -> Tensor:
    """Pictures as one clip.

    Args:
        frames: PIL images, or uint8 (f, H, W, 3).
        height, width: of the clip, in pixels.
        mode: "RGB", or "L" for gray.

    Returns:
        float32 (f, 3, height, width) in [-1, 1]; of mode "L" (f, 1, height, width).

    Raises:
        UserError: no pictures, or something else among them.
    """
    pictures = [Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame for frame in frames]
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        what = f"{type(pictures[0]).__name__}s" if pictures else "none"
        raise UserError(f"got {what}, expected at least one picture: PIL images, or a tensor in [-1, 1]")
    fitted = np.stack([np.asarray(fit(picture.convert(mode), height, width)) for picture in pictures])
    fitted = fitted.reshape(len(fitted), height, width, -1)
    return torch.from_numpy(fitted).movedim(-1, 1).float().contiguous() / 127.5 - 1
