"""Small pictures of latents and clips: what the page shows while a clip is made, and beside what was uploaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from animatediff.media.pictures import encode
from animatediff.media.video import read_video, to_uint8
from animatediff.models.vae import VAE

SMALL = 2_000_000  # parameters of a decoder that is quick enough to be its own preview
MOST_FRAMES, SIDE = 32, 256  # of a preview; pixels
RIDGE = 1e-3  # of the least squares, per latent pixel


class LatentPreview:
    """Latents to small pictures: by the VAE's decoder where it is small, else by the linear map that is nearest to it.

    The colour of a latent pixel is close to a linear function of its channels. It is fitted by least squares on single
    frames of the clip, as the decoder shows them: of the 1st, 2nd, 4th, 8th … preview.
    """

    def __init__(self, vae: VAE, *, small: bool | None = None):
        """`small`: whether the decoder is its own preview; by default where it has at most SMALL parameters."""
        channels = vae.config.latent_channels
        self.vae = vae
        self.small = sum(p.numel() for p in vae.decoder.parameters()) <= SMALL if small is None else small
        self._count = 0
        self._xx, self._xy = torch.eye(channels + 1) * RIDGE, torch.zeros(channels + 1, 3)

    @torch.no_grad()
    def frames(self, latents: Tensor) -> np.ndarray:
        """uint8 (f, H, W, 3), at most MOST_FRAMES of them, of scaled latents (1, f, c, h, w)."""
        latents = latents[:1, :: -(-latents.shape[1] // MOST_FRAMES)].float()
        if self.small:
            video = self.vae.decode_video(latents)[0].float()
        else:
            self._count += 1
            if self._count & (self._count - 1) == 0:
                self._fit(latents[:, latents.shape[1] // 2, None])
            colours = torch.linalg.solve(self._xx, self._xy)
            video = rearrange(_with_constant(latents[0].cpu()) @ colours, "f h w c -> f c h w")
        return to_uint8((video / 2 + 0.5).clamp(0, 1).nan_to_num())

    def _fit(self, latents: Tensor) -> None:
        """Take one frame (1, 1, c, h, w) into the least squares."""
        decoded = self.vae.decode_video(latents)[0].float().cpu()
        small = functional.adaptive_avg_pool2d(decoded, latents.shape[-2:])
        x = rearrange(_with_constant(latents[0].cpu()), "f h w c -> (f h w) c")
        y = rearrange(small, "f c h w -> (f h w) c")
        self._xx += x.T @ x / len(x)
        self._xy += x.T @ y / len(x)


def _with_constant(latents: Tensor) -> Tensor:
    """(f, h, w, c + 1) of latents (f, c, h, w)."""
    return functional.pad(rearrange(latents, "f c h w -> f h w c"), (0, 1), value=1.0)


def animated(frames: np.ndarray, fps: float) -> bytes:
    """A WebP of frames (f, H, W, 3) that goes on for ever."""
    return encode(frames, ".webp", is_batch=True, duration=max(round(1000 / fps), 10), loop=0, quality=70)


def thumbnail(path: str | Path) -> bytes:
    """A WebP of a picture or clip, shrunk to SIDE pixels, of its first MOST_FRAMES frames.

    Raises:
        UserError: it cannot be read.
    """
    frames, fps = read_video(path, most=MOST_FRAMES)
    f, h, w, _ = frames.shape
    scale = min(SIDE / max(h, w), 1)
    size = (max(round(h * scale), 1), max(round(w * scale), 1))
    small = functional.interpolate(frames.movedim(-1, 1).float(), size=size, mode="area")
    return animated(to_uint8(small / 255), fps)
