"""Captioned still images as clips of one frame: what an image model is personalised with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from animatediff.config.settings import Int, Many, opt, options
from animatediff.media.pictures import read_picture
from animatediff.media.seek import UnusableVideo
from animatediff.training.data.clips import CaptionedVideo, Series, check_size, read_caption
from animatediff.utils import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@options
class ImageConfig:
    """Which pictures, and how they are cut."""

    image_folder: str = opt(..., "every picture at any depth, its caption in a .txt of the same name beside it")
    caption: str = opt("", 'of pictures without a .txt, such as "a photo of sks dog"')
    sample_size: Many[Int] = opt((512,), "pixels: the side of a square, or height and width", min_length=1)
    crop: Literal["center", "random"] = opt("center", "which part of a picture")
    flip: bool = opt(False, "mirror half of the pictures; not where captions tell left from right")

    def __post_init__(self) -> None:
        check_size(self.sample_size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.sample_size[0], self.sample_size[-1]


class Images(Series):
    """Still images as clips (1, 3, h, w): a `Series`, scaled until the size is covered, then cropped.

    Raises:
        UserError: the folder is missing or has no picture.
    """

    kind, nothing = "pictures", "picture"

    def __init__(self, config: ImageConfig, *, seed: int = 0):
        super().__init__(list_images(config), seed=seed)
        self.config = config

    def _draw(self, file: CaptionedVideo, rng: np.random.Generator) -> Tensor:
        (h, w), image = self.config.size, open_image(file)
        scale = max(h / image.height, w / image.width)
        wide, high = (max(side, round(scale * now)) for side, now in ((w, image.width), (h, image.height)))
        image = image.resize((wide, high), Image.Resampling.LANCZOS)
        room = high - h, wide - w
        top, left = (int(rng.integers(r + 1)) if self.config.crop == "random" else r // 2 for r in room)
        image = image.crop((left, top, left + w, top + h))
        if self.config.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float() / 127.5 - 1

    def _look(self, file: CaptionedVideo) -> bool:
        open_image(file)
        return False


def open_image(file: CaptionedVideo) -> Image.Image:
    """A captioned picture.

    Raises:
        UnusableVideo: it has no caption, or cannot be read.
    """
    if file.caption is None:
        raise UnusableVideo("no caption")
    try:
        return Image.fromarray(read_picture(file.path))
    except UserError as error:
        raise UnusableVideo("unreadable", str(error)) from None


def list_images(config: ImageConfig) -> list[CaptionedVideo]:
    """The pictures of a folder, in the order of their names.

    Raises:
        UserError: the folder is missing or has no picture.
    """
    folder = Path(config.image_folder)
    if not folder.is_dir():
        raise UserError(f"got image_folder {folder}, which is no folder: check the path")
    images = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_ENDINGS:
            caption = read_caption(path)
            images.append(CaptionedVideo(path, caption if caption is not None else config.caption or None))
    if not images:
        raise UserError(f"got {folder} without a picture, expected at least one: {', '.join(IMAGE_ENDINGS)}")
    return images
