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
from animatediff.models.tiny_decoder import TinyDecoder
from animatediff.models.vae import VAE

SMALL = 2_000_000  # parameters of a decoder that is quick enough to be its own preview
MOST_FRAMES, SIDE = 32, 256  # of a preview; pixels
RIDGE = 1e-3  # of the least squares, per latent pixel


def is_small(vae: VAE) -> bool:
    """Whether a VAE's decoder is quick enough to be its own preview."""
    return sum(p.numel() for p in vae.decoder.parameters()) <= SMALL


class LatentPreview:
    """Latents to small pictures: by the VAE's decoder where it is small, by a tiny one of the same latents where the
    user has its file, else by the linear map that is nearest to the VAE's.

    The colour of a latent pixel is close to a linear function of its channels. It is fitted by least squares on single
    frames of the clip, as the decoder shows them: of the 1st, 2nd, 4th, 8th … preview.
    """

    def __init__(self, vae: VAE, *, small: bool, tiny: TinyDecoder | None = None):
        """`small`: whether the decoder is its own preview; `tiny`: what decodes in its place otherwise."""
        channels = vae.config.latent_channels
        self.vae, self.tiny = vae, tiny
        self.small = small
        self._count = 0
        self._xx, self._xy = torch.eye(channels + 1) * RIDGE, torch.zeros(channels + 1, 3)

    @torch.no_grad()
    def frames(self, latents: Tensor) -> np.ndarray:
        """uint8 (f, H, W, 3), at most MOST_FRAMES of them, of scaled latents (1, f, c, h, w)."""
        latents = latents[:1, :: -(-latents.shape[1] // MOST_FRAMES)].float()
        if self.small:
            video = self.vae.decode_video(latents)[0].float()
        elif self.tiny is not None:
            decoded = (self.tiny(frame[None]) for frame in latents[0])
            video = torch.cat([functional.adaptive_avg_pool2d(one, _at_most(one.shape[-2:])) for one in decoded])
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


def _at_most(size: torch.Size) -> tuple[int, int]:
    """Height and width, shrunk to SIDE pixels."""
    scale = min(SIDE / max(size), 1)
    height, width = (max(round(side * scale), 1) for side in size)
    return height, width


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
    small = functional.interpolate(frames.movedim(-1, 1).float(), size=_at_most(frames.shape[1:3]), mode="area")
    return animated(to_uint8(small / 255), fps)
