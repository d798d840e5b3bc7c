"""From clean latents to what a caller wants to see."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from PIL import Image
from torch import Tensor

from animatediff.media.video import to_uint8
from animatediff.models.vae import VAE

OUTPUT_TYPES = ("pil", "np", "pt", "tensor", "latent")


def decode(vae: VAE, latents: Tensor, output_type: str, *, chunk_frames: int) -> Any:
    """Clips of latents (b, f, c, h, w), in one of OUTPUT_TYPES (see `AnimateDiffPipeline.__call__`)."""
    if output_type == "latent":
        return rearrange(latents, "b f c h w -> b c f h w")
    video = vae.decode_video(latents, chunk_frames=chunk_frames).float().cpu()
    video = (video / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return video
    if output_type == "tensor":
        return rearrange(video, "b f c h w -> b c f h w")
    if output_type == "np":
        return rearrange(video, "b f c h w -> b f h w c").numpy()
    return [[Image.fromarray(frame) for frame in to_uint8(clip)] for clip in video]
