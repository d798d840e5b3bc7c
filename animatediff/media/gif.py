"""Animated GIFs with one palette for the whole clip."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import GifImagePlugin, Image

from animatediff.utils import UserError

GIF_MAX_FPS = 50  # delays are in 1/100 s, and viewers slow down whatever is shorter than 2


def global_palette(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One palette for a whole clip, and the clip in it, without dithering: what stands still does not flicker.

    Up to 256 colours are kept exactly. More are clustered (median cut, then Lloyd's k-means on a sample), and every
    pixel takes the entry nearest to its colour, of which two bits per channel are left out.

    Args:
        frames: uint8 (f, H, W, 3).

    Returns:
        Palette, uint8 (256, 3), and indices into it, uint8 (f, H, W).
    """
    packed = frames[..., 0].astype(np.int32) << 16 | frames[..., 1].astype(np.int32) << 8 | frames[..., 2]
    seen = np.zeros(1 << 24, bool)
    seen[packed] = True
    colors = np.flatnonzero(seen)
    palette = np.zeros((256, 3), np.uint8)
    table = np.zeros(1 << 24, np.uint8)
    if len(colors) <= 256:
        palette[: len(colors)] = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=-1)
        table[colors] = np.arange(len(colors))
        return palette, table[packed]
    palette = _cluster(frames.reshape(-1, 3))
    cells = np.flatnonzero(np.bincount(_cell(colors), minlength=1 << 18))
    centers = np.stack([cells >> 12, cells >> 6 & 63, cells & 63], axis=-1) * 4 + 1.5
    table[cells] = _nearest(centers.astype(np.float32), palette.astype(np.float32))
    return palette, table[_cell(packed)]


def _cell(packed: np.ndarray) -> np.ndarray:
    """Six bits of each channel of packed 24-bit colours."""
    return packed >> 6 & 0x3F000 | packed >> 4 & 0xFC0 | packed >> 2 & 0x3F


def _cluster(colors: np.ndarray, *, sample: int = 40_000, iterations: int = 10) -> np.ndarray:
    """256 colours that stand for (n, 3) of them."""
    some = np.ascontiguousarray(colors[:: max(len(colors) // sample, 1)])
    cut = Image.fromarray(some[None]).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    start = np.frombuffer(bytes(cut.getpalette() or b""), np.uint8).reshape(-1, 3)[:256]
    centers = np.zeros((256, 3), np.float32)
    centers[: len(start)] = start
    points = some.astype(np.float32)
    for _ in range(iterations):
        nearest = _nearest(points, centers)
        count = np.bincount(nearest, minlength=256)[:, None]
        total = np.stack([np.bincount(nearest, points[:, c], minlength=256) for c in range(3)], axis=-1)
        centers = np.where(count > 0, total / np.maximum(count, 1), centers).astype(np.float32)
    return centers.round().astype(np.uint8)


def _nearest(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Index of the centre nearest to each of (n, 3) points."""
    parts = np.array_split(points, len(points) // 16_384 + 1)
    return np.concatenate([((centers**2).sum(1) - 2 * part @ centers.T).argmin(1) for part in parts])


def write_gif(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    """Write an endless GIF with exactly these frames, and a comment.

    Put together here, because Pillow's own writer joins equal frames and so loses count of a clip that stands still.

    Args:
        frames: uint8 (f, H, W, 3).
        path: file to write.
        fps: at most 50; delays are multiples of 10 ms, spread so that the clip's length is right.
        comment: ASCII text.

    Raises:
        UserError: too high an fps.
    """
    if fps > GIF_MAX_FPS:
        raise UserError(f"got fps {fps:g} for a GIF, expected at most {GIF_MAX_FPS}: use mp4 or webp")
    palette, indices = global_palette(frames)
    ends = np.round(np.arange(1, len(frames) + 1) * 100 / fps).astype(int)
    _, height, width = indices.shape
    with path.open("wb") as file:
        file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0b1_111_0_111, 0, 0) + palette.tobytes())
        file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # loop for ever
        text = comment.encode("ascii")
        blocks = [text[i : i + 255] for i in range(0, len(text), 255)]
        file.write(b"!\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0")
        for frame, delay in zip(indices, np.diff(ends, prepend=0), strict=True):
            image = Image.fromarray(frame)
            file.write(b"!\xf9\x04\x04" + struct.pack("<HBB", delay, 0, 0))  # leave the frame in place
            file.write(b"".join(GifImagePlugin.getdata(image)))
        file.write(b";")
