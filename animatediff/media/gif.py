"""Animated GIFs with one palette for the whole clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from animatediff.media.pictures import encode

SAMPLE = 20_000  # pixels that the palette of more than 256 colours is made from: more cost time and gain 0.1 dB


def write_gif(frames: np.ndarray, path: Path, **options: object) -> None:
    """Write frames, uint8 (f, H, W, 3), with Pillow's options. What stands still does not flicker: nothing is dithered.

    Up to 256 colours are kept exactly; more are clustered (median cut, then k-means on a sample).
    """
    whole = Image.fromarray(frames.reshape(-1, frames.shape[2], 3))
    palette = None
    if whole.getcolors(256) is None:
        colors = frames.reshape(-1, 3)
        sample = colors[:: len(colors) // SAMPLE | 1]  # an odd step meets all columns
        palette = Image.fromarray(np.ascontiguousarray(sample)[None]).quantize(256, kmeans=1)
    indexed = whole.quantize(256, palette=palette, dither=Image.Dither.NONE)
    indices = np.asarray(indexed).reshape(frames.shape[:3])
    palette = bytes(indexed.getpalette() or ())
    path.write_bytes(encode(indices, ".gif", is_batch=True, palette=palette, **options))
