"""Pictures for an encoder: reference images from files, and the resizing and cropping that encoders expect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from animatediff.media.video import read_video
from animatediff.utils import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
CLIPS = (".gif", ".webp", ".mp4")  # stills, too; all of their frames count


def signed(frames: Tensor) -> Tensor:
    """uint8 pictures as floats in [-1, 1]."""
    return frames.float() / 127.5 - 1


def cover(images: Tensor, size: int) -> Tensor:
    """The middle square of pictures: the shorter side shrunk or grown to `size` pixels, the longer one cropped.

    Bicubic with antialiasing and rounded to 8 bits, as CLIP was trained.

    Args:
        images: (n, 3, H, W) in [-1, 1].

    Returns:
        (n, 3, size, size) in [-1, 1].
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    height, width = int(size * height / shorter), int(size * width / shorter)
    if shorter != size:
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
        images = signed(((images + 1) * 127.5).round().clamp(0, 255))
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """Files of pictures that some paths stand for, each once, in the order of the paths and of their names.

    Args:
        paths: files (PNG, JPEG, BMP; GIF, WebP, MP4), and folders with such files in them, however deep.

    Raises:
        UserError: a path that does not exist, a file of another kind, a folder without a picture.
    """
    endings = (*IMAGES, *CLIPS)
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"got reference {path}, which does not exist: check the path")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        pictures = [p for p in inside if p.is_file() and p.suffix.lower() in endings]
        if not pictures:
            raise UserError(f"got reference {path}, expected a picture ({', '.join(endings)}) or a folder of pictures")
        found |= dict.fromkeys(pictures)
    return list(found)


def read_pictures(path: Path) -> Tensor:
    """The picture, or all frames, of a file: (n, 3, H, W) in [-1, 1].

    Raises:
        UserError: the file cannot be read.
    """
    return signed(read_video(path)[0].movedim(-1, 1))
