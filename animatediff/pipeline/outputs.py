"""From clean latents to what a caller wants to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from animatediff.config.request import Request
from animatediff.media.video import to_uint8
from animatediff.models.vae import VAE
from animatediff.utils import UserError, is_out_of_memory

OUTPUT_TYPES = ("pil", "np", "pt", "tensor", "latent")


@contextmanager
def one_line_when_full(request: Request) -> Iterator[None]:
    """Raises: UserError in place of the many errors that a full memory gives."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size, finish = request.size, request.finish
        frames, tiles = f"{size.num_frames} frames of {size.height}x{size.width}", ""
        if finish.enlarges:
            frames, tiles = f"{frames} to be made larger", ", finish.tile=512, memory.vae_tile=512"
        raise UserError(
            f"entry {request.output.name}: got {frames}, more than the device's memory can take: give a "
            f"--max-memory below what is there, or choose smaller L, H or W{tiles}"
        ) from None


def decode_video(vae: VAE, latents: Tensor, *, chunk_frames: int) -> Tensor:
    """Pixels (b, f, 3, H, W) in [0, 1], float32 on the CPU, of latents (b, f, c, h, w).

    What is out of memory is tried again with half as many frames at a time, what overflowed in float32: latents that
    took minutes are not lost to the last second.
    """
    while True:
        try:
            video = _decoded(vae, latents, chunk_frames)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or chunk_frames == 1:
                raise
            chunk_frames = max(min(chunk_frames, latents.shape[1]) // 2, 1)
    weight = next(vae.parameters())
    if not bool(video.isfinite().all()) and bool(latents.isfinite().all()) and weight.dtype != torch.float32:
        dtype = weight.dtype
        try:
            video = _decoded(vae.float(), latents, chunk_frames)
        finally:
            vae.to(dtype)
    return (video / 2 + 0.5).clamp(0, 1)


def _decoded(vae: VAE, latents: Tensor, chunk: int) -> Tensor:
    """Only `chunk` frames at a time are on the VAE's device."""
    parts = [vae.decode_video(part, chunk_frames=chunk).float().cpu() for part in latents.split(chunk, dim=1)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def decode(vae: VAE, latents: Tensor, output_type: str, *, chunk_frames: int) -> Any:
    """Clips of latents (b, f, c, h, w), in one of OUTPUT_TYPES (see `AnimateDiffPipeline.__call__`)."""
    if output_type == "latent":
        return rearrange(latents, "b f c h w -> b c f h w")
    return as_output(decode_pixels(vae, latents, chunk_frames=chunk_frames), output_type)


def decode_pixels(vae: VAE, latents: Tensor, *, chunk_frames: int = 8) -> Tensor:
    """As `decode_video`; raises UserError for latents that are not finite."""
    check_finite(latents)
    return decode_video(vae, latents, chunk_frames=chunk_frames)


def as_output(video: Tensor, output_type: str) -> Any:
    """Clips (b, f, 3, H, W) in [0, 1] in one of OUTPUT_TYPES but "latent"."""
    if output_type == "pt":
        return video
    if output_type == "tensor":
        return rearrange(video, "b f c h w -> b c f h w")
    if output_type == "np":
        return rearrange(video, "b f c h w -> b f h w c").numpy()
    return [[Image.fromarray(frame) for frame in to_uint8(clip)] for clip in video]


def as_bytes(video: Tensor) -> Tensor:
    """uint8 of floats in [0, 1], of any shape."""
    return (video * 255).round().to(torch.uint8)


def decode_frames(vae: VAE, latents: Tensor, *, chunk: int = 8) -> Iterator[Any]:
    """The frames of one clip (1, f, c, h, w), uint8 (H, W, 3), one by one: only `chunk` are there at a time."""
    check_finite(latents)
    for part in latents.split(chunk, dim=1):
        yield from to_uint8(decode_video(vae, part, chunk_frames=chunk)[0])


def check_finite(latents: Tensor) -> None:
    """Raises: UserError for latents that overflowed while they were sampled."""
    if not bool(latents.isfinite().all()):
        raise UserError(
            "got latents that are not finite: the network overflowed, or a weight file holds values that are not "
            "numbers: try --dtype float32"
        )
