"""PIA (arXiv 2312.13964): a motion module that animates a given picture; how much of it each frame keeps is a number.

Its `conv_in` has nine channels: the noisy latent, a mask and the latent of the picture. The first four are the image
model's own, so that only the other five are kept here; what they add does not change from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Affinity to the picture by the distance of a frame to it, from the official code; beyond the list the last one holds.
AFFINITIES = {
    "small": (1.0, 0.9, 0.85, 0.85, 0.85, 0.8),
    "medium": (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75),
    "large": (1.0, 0.8, *(0.7,) * 8, 0.6, 0.5),
}
STYLE_TRANSFER_AFFINITIES = {  # for pictures that the image model would not paint itself
    "small": (0.5, 0.4, 0.4, 0.4, 0.35, 0.3),
    "medium": (0.5, 0.4, 0.4, 0.4, 0.35, 0.35, 0.3, 0.25, 0.2),
    "large": (0.5, 0.2),
}
LOOP_AFFINITIES = {  # there, and back from the last frame
    "small": ((1.0, 0.9, 0.85, 0.85, 0.85, 0.8), (1.0, 0.9, 0.85, 0.85, 0.8)),
    "medium": ((1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75), (1.0, 0.8, 0.8, 0.79, 0.78, 0.75)),
    "large": ((1.0, 0.8, *(0.7,) * 4, 0.6, 0.5), (1.0, 0.8, *(0.7,) * 4, 0.6, 0.5)),
}


class PIACondition(nn.Module):
    """The five input channels of a mask and a picture.

    Args:
        latent_channels: of the VAE.
        out_channels: of the UNet's `conv_in`.
    """

    def __init__(self, latent_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(1 + latent_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, latents: Tensor, affinity: Tensor) -> Tensor:
        """`input_residual` of `UNet.forward` for one video, (f, c, h, w).

        Args:
            latents: scaled latents (latent_channels, h, w) of the picture.
            affinity: (f,), 0 … 1 for each frame.
        """
        mask = affinity.to(latents)[:, None, None, None].expand(-1, 1, *latents.shape[-2:])
        return self.conv(torch.cat([mask, latents.expand(len(affinity), -1, -1, -1)], dim=1))


def pia_affinity(
    motion: str, frames: int, *, picture_frame: int = 0, loop: bool = False, style_transfer: bool = False
) -> list[float]:
    """How alike to the picture each frame of a clip is to be: 1 the same, 0 not at all.

    Args:
        motion: "small", "medium" or "large".
        picture_frame: the frame that the picture is.
        loop: come back to the picture in the last frame.
        style_transfer: let the image model paint the picture its own way.
    """
    distances = [abs(frame - picture_frame) for frame in range(frames)]
    if not loop:
        values = (STYLE_TRANSFER_AFFINITIES if style_transfer else AFFINITIES)[motion]
        return [_at(values, distance) for distance in distances]
    out, back = LOOP_AFFINITIES[motion]
    clip = [_at(out, i) if i < frames / 2 else _at(back, frames - 1 - i) for i in range(frames)]
    return [clip[distance] for distance in distances]


def _at(values: Sequence[float], i: int) -> float:
    return values[min(i, len(values) - 1)]
