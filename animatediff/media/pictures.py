"""Pictures in and out of files, and cropped and resized to a clip's size: one reader for all who take pictures."""

from __future__ import annotations

import itertools
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from imageio.core.request import InitializationError
from imageio.core.v3_plugin_api import PluginV3
from PIL import Image
from torch import Tensor

from animatediff.utils import UserError, replacing

Picture = str | Path | Image.Image | np.ndarray
ANIMATED = (".gif", ".webp", ".png", ".apng")  # of other files the first picture is taken
MAX_PIXELS = 2**27  # of one picture: 16384 x 8192
EXIF_ORIENTATION = 0x0112
# How files begin that Pillow knows and that are no pictures: for PostScript it starts a program; WMF, EMF are drawings.
OTHERS = (b"%!PS", b"\xc5\xd0\xd3\xc6", b"\xd7\xcd\xc6\x9a", b"\x01\0\0\0")
WHITE, BLACK = 255, 0
# What Pillow raises for damaged files, depending on where the damage is.
DAMAGE = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
DAMAGE += (EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)


# ---- files ----------------------------------------------------------------------------------------------------


def read_picture(path: str | Path, *, background: int = WHITE) -> np.ndarray:
    """A picture, or the first frame of several, uint8 (H, W, 3), as viewers show it.

    Args:
        path: what Pillow reads, in any mode: 16 bits per channel become 8, transparent pixels show the background, and
            a camera's orientation is undone.
        background: gray level from BLACK to WHITE.

    Raises:
        UserError: no such file, none that can be read, or too large a picture.
    """
    return next(read_animation(path, background=background))[0].copy()


def read_animation(path: str | Path, *, background: int = WHITE) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """The frames of a picture file, one after the other, each as by `read_picture` and with what the file says of it.

    Raises:
        UserError: as `read_picture`, when the frame is come to.
    """
    path = Path(path)
    with _open(path) as file:
        orientation = None
        for index in itertools.count():
            try:
                info = file.metadata(index=index)
            except EOFError:
                if index:
                    return
                raise
            width, height = info["shape"]
            if width * height > MAX_PIXELS:
                raise UserError(f"got {path} of {width}x{height} pixels, expected at most {MAX_PIXELS}: shrink it")
            mode = _readable_mode(info["mode"], "transparency" in info)
            pixels = file.read(index=index, mode=mode, writeable_output=False)
            info = file.metadata(index=index, exclude_applied=index > 0)  # of a WebP, its delay is known only now
            orientation = info.get("Orientation", orientation)
            yield upright(to_rgb(pixels, background), orientation), info
            if path.suffix.lower() not in ANIMATED:
                return


def read_info(path: str | Path) -> dict[str, Any]:
    """What a picture file says of itself, such as comments; its pixels are not decoded.

    Raises:
        UserError: no such file, or none that can be read.
    """
    with _open(Path(path)) as file:
        return file.metadata(index=0)


def read_mask(path: str | Path, *, height: int, width: int) -> Tensor:
    """How white a picture is, float32 (height, width) in [0, 1]; what is transparent is black.

    Raises:
        UserError: no picture, or one of another size.
    """
    pixels = read_picture(path, background=BLACK)
    if pixels.shape[:2] != (height, width):
        h, w, _ = pixels.shape
        raise UserError(f"got mask {path} of {w}x{h} pixels, expected {width}x{height}, the clip's size: resize it")
    return torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) / 255)


def write_picture(picture: Image.Image | np.ndarray, path: Path) -> None:
    """Write a picture, uint8 (H, W, 3) or (H, W), as a PNG.

    Raises:
        UserError: what the system refuses.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(encode(np.asarray(picture), ".png"))


def encode(pixels: np.ndarray, ending: str, **options: Any) -> bytes:
    """A picture file of uint8 (H, W, 3) or (H, W), or with `is_batch` of (f, H, W, 3) or (f, H, W).

    Not written right away: on a full disk imageio tries twice, and has Python print what came of the second time.

    Args:
        ending: such as ".png".
        options: imageio's and Pillow's.
    """
    return iio.imwrite("<bytes>", pixels, plugin="pillow", extension=ending, **options)


@contextmanager
def _open(path: Path) -> Iterator[PluginV3]:
    """A picture file in imageio.

    Raises:
        UserError: it is missing, no file (such as a named pipe, which might never end), no picture, or damaged.
    """
    if not path.is_file():
        what = "which is no file" if path.exists() else "which does not exist"
        raise UserError(f"got {path}, {what}: check the path")
    none = UserError(f"got {path}, expected a picture (GIF, WebP, PNG, JPEG …): it is none")
    with _naming_damage(path):
        with path.open("rb") as file:
            if file.read(4) in OTHERS:
                raise none
        try:
            picture = iio.imopen(path.absolute(), "r", plugin="pillow")
        except OSError as error:
            raise none if isinstance(error.__cause__, InitializationError) else error from None
        with picture:
            yield picture


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what it has to say of a picture is no news on the console
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"got {path}, which cannot be decoded ({reason}): it may be cut off") from None


# ---- pixels ---------------------------------------------------------------------------------------------------


def to_rgb(pixels: np.ndarray, background: int = WHITE) -> np.ndarray:
    """uint8 (H, W, 3) of uint8 (H, W, 3) or (H, W, 4), or of gray (H, W): 16-bit integers, or floats in [0, 1]."""
    if pixels.ndim == 2:
        gray = np.nan_to_num(pixels.astype(np.float32))
        gray *= 1 / 257 if pixels.dtype.kind in "iu" else 255 if gray.max(initial=0) <= 1 else 1
        return np.repeat(gray.clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=2)
    if pixels.shape[2] == 3:
        return pixels
    rgb, alpha = np.empty((*pixels.shape[:2], 3), np.uint8), pixels[..., 3].astype(np.uint16)
    for channel in range(3):
        rgb[..., channel] = (pixels[..., channel] * alpha + background * (255 - alpha) + 127) // 255
    return rgb


def upright(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """Pixels (H, W, …) turned as an EXIF orientation, 1 to 8, says; as they are for anything else."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _readable_mode(mode: str, transparent: bool) -> str | None:
    """The mode to convert to before pixels are looked at; None where Pillow would cut off at 255."""
    if mode.startswith(("I", "F")):
        return None
    return "RGBA" if transparent or mode.lower().endswith("a") else "RGB"


def _rgb_of(picture: Picture, background: int) -> np.ndarray:
    if isinstance(picture, str | Path):
        return read_picture(picture, background=background)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    with _naming_damage(Path(getattr(picture, "filename", "") or "a picture")):
        mode = _readable_mode(picture.mode, picture.has_transparency_data)
        pixels = to_rgb(np.asarray(picture.convert(mode) if mode else picture), background)
        return upright(pixels, picture.getexif().get(EXIF_ORIENTATION))


# ---- the size of a clip ---------------------------------------------------------------------------------------


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


def fit_pictures(
    pictures: Sequence[Picture], height: int, width: int, *, mode: str = "RGB", background: int = WHITE
) -> Tensor:
    """Pictures of one size, uint8 (n, 3, height, width); of mode "L" (gray) uint8 (n, 1, height, width).

    Args:
        pictures: files, PIL images in any mode, or uint8 (H, W, 3).
        height, width: in pixels.
        background: gray level, BLACK to WHITE, behind what is transparent.

    Raises:
        UserError: no pictures, something else among them, or what `read_picture` refuses.
    """
    if not len(pictures):
        raise UserError("got none, expected at least one picture: add one")
    fitted = np.stack(
        [np.asarray(fit(Image.fromarray(_rgb_of(p, background)).convert(mode), height, width)) for p in pictures]
    )
    return torch.from_numpy(fitted.reshape(len(fitted), height, width, -1)).movedim(-1, 1).contiguous()


def fit_frames(pictures: Sequence[Picture], height: int, width: int, *, mode: str = "RGB") -> Tensor:
    """As `fit_pictures`, of pictures in memory, float32 in [-1, 1]; transparent parts of gray ones (masks) are black.

    Raises:
        UserError: no pictures, or something else among them.
    """
    strange = [type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image | np.ndarray)]
    if strange or not len(pictures):
        what = f"{strange[0]}s" if strange else "none"
        raise UserError(f"got {what}, expected at least one picture: PIL images, or a tensor in [-1, 1]")
    background = BLACK if mode == "L" else WHITE
    return fit_pictures(pictures, height, width, mode=mode, background=background).float() / 127.5 - 1
