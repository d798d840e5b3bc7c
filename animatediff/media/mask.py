"""Masks from picture files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from animatediff.utils import UserError


def read_mask(path: str | Path, *, height: int, width: int) -> Tensor:
    """How white a picture is, float32 (height, width) in [0, 1].

    Raises:
        UserError: no picture, or one of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"), dtype=np.float32)
    except OSError:
        raise UserError(f"got mask {path}, which is no picture: check the path") from None
    if pixels.shape != (height, width):
        h, w = pixels.shape
        raise UserError(f"got mask {path} of {w}x{h} pixels, expected {width}x{height}, the clip's size: resize it")
    return torch.from_numpy(pixels / 255)
