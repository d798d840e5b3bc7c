"""Pictures larger than the network was trained on: overlapping tiles, whose predictions are fused.

It is windows (`windows.py`) in height and width (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113). It goes
directly around the network, before all features, none of which may hand in anything of the whole picture's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from einops import rearrange
from torch import Tensor

from animatediff.features.feature import Feature, FrameDenoise, Run
from animatediff.models.tiles import tiled


def spatial_tiles(size: int) -> Feature:
    """A feature that shows the network tiles of `size` latent pixels, of which neighbours share a quarter or more."""

    @contextmanager
    def in_tiles(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
        def predict(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
            def of_tile(part: Tensor) -> Tensor:
                part = rearrange(part, "(b f) c h w -> b f c h w", b=len(x))
                return rearrange(denoise(part, t, frames, **inputs), "b f c h w -> (b f) c h w")

            pictures = tiled(of_tile, rearrange(x, "b f c h w -> (b f) c h w"), size)
            return rearrange(pictures, "(b f) c h w -> b f c h w", b=len(x))

        yield predict

    return in_tiles
