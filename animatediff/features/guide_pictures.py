"""Pictures that options name: files, clips, folders, PIL images, arrays and tensors, in a row or by frame."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from animatediff.checkpoints.known_files import find_file, missing_file
from animatediff.config.request import Inputs
from animatediff.features.feature import Run
from animatediff.features.inputs import as_picture, read_beside_video
from animatediff.media.pictures import fit_frames
from animatediff.media.video import read_video
from animatediff.utils import UserError, naming


def read_pictures(images: Any, *, most: int | None = None, beside: Inputs | None = None) -> dict[int, Image.Image]:
    """Number -> picture: the numbers of frames where they are given, else 0, 1 …

    Args:
        images: one or several of: files of pictures or clips, folders of pictures, PIL images, arrays (H, W, 3) of
            uint8 or of floats in [0, 1], or a tensor (n, 3, H, W) of these; or {frame: one of them}.
        most: how many are enough.
        beside: to whose video clips of more than `most` frames belong: they are read at the same start and speed.

    Raises:
        UserError: a file cannot be read, or something else is given.
    """
    if isinstance(images, Mapping):
        return {frame: _only(image, f"images[{frame}]") for frame, image in images.items()}
    items = list(images) if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4 else [images]
    found: list[Image.Image] = []
    for i, item in enumerate(items):
        with naming(f"images[{i}]" if len(items) > 1 else "images"):
            found += _pictures(item, most, beside)
    return dict(enumerate(found[:most]))


def picture_latents(image: Any, run: Run) -> Tensor:
    """Scaled latents (c, h, w) of one picture at a clip's size, in the model's type. Raises: as `read_pictures`."""
    model, size = run.model, run.request.size
    pixels = fit_frames([_only(image, "image")], size.height, size.width).to(model.device)
    return model.vae.encode_video(pixels[None])[0, 0].to(model.dtype)


def _only(image: Any, name: str) -> Image.Image:
    with naming(name):
        pictures = _pictures(image, 2)
        if len(pictures) != 1:
            raise UserError("got a clip, expected one picture for a frame")
    return pictures[0]


def _pictures(item: Any, most: int | None, beside: Inputs | None = None) -> list[Image.Image]:
    if isinstance(item, (str, Path)):
        if (path := find_file(str(item))) is None:
            raise UserError(missing_file(str(item)))
        timed = beside is not None and beside.video is not None and most is not None
        video = read_beside_video(path, beside, most) if timed else read_video(path, most=most)[0]
        return [Image.fromarray(frame) for frame in video.numpy()]
    if isinstance(item, Tensor):
        item = item.movedim(0, -1).cpu().numpy()
    return [as_picture(item)]
