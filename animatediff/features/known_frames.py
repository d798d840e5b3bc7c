"""Latents that are known, of a video, a masked part, first and last frames, and stay while the rest is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.inversion import invert
from animatediff.diffusion.samplers import Callback
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.inputs import PixelInputs
from animatediff.models.vae import VAE


@dataclass(frozen=True)
class KnownFrames:
    """What is known of a clip.

    Attributes:
        clean: latents (b, f, c, h, w); any values where nothing is known.
        init_weight: how much of them (f,) each frame begins with, 0 (noise alone) to 1.
        known_mask: bool, True where `clean` stays; broadcasts to its shape.
    """

    clean: Tensor
    init_weight: Tensor | float = 1.0
    known_mask: Tensor | None = None

    def begin(
        self,
        noise: Tensor,
        *,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        all_steps: bool,
        unguided: Denoise | None = None,
    ) -> tuple[Tensor, Callback | None]:
        """Latents to sample from, and what is to be called after every step.

        Args:
            noise: standard normal, of the shape of `clean`.
            timesteps: (steps,), those to visit, none included.
            all_steps: none was left out: sampling starts at the noise itself.
            unguided: a denoiser for DDIM inversion, which takes the place of the noise.
        """
        if not len(timesteps):
            return self.clean, None
        alpha = float(schedule.alpha_at(timesteps[0]))
        if unguided is not None:
            x = invert(unguided, self.clean, schedule=schedule, timesteps=timesteps)
            noise = (x - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
        else:
            weight = torch.as_tensor(self.init_weight).reshape(-1, 1, 1, 1)
            x = noise if all_steps else noised(self.clean, noise, alpha, weight)
        if self.known_mask is None:
            return x, None
        x = torch.where(self.known_mask, noised(self.clean, noise, alpha), x)
        return x, restore_known(self.clean, noise, self.known_mask, schedule=schedule, timesteps=timesteps)


def noised(clean: Tensor, noise: Tensor, alpha: float, weight: Tensor | float = 1.0) -> Tensor:
    """sqrt(abar) w x_0 + sqrt(1 - abar w²) noise: noised data of which only a part is left, of variance 1.

    Args:
        clean, noise: (b, f, c, h, w).
        alpha: abar, 0 (noise) to 1 (clean).
        weight: 0 (none of it) to 1, a tensor of any shape that broadcasts.
    """
    signal = alpha**0.5 * torch.as_tensor(weight).to(clean)
    return signal * clean + (1 - signal**2).clamp(min=0).sqrt() * noise


def restore_known(
    clean: Tensor, noise: Tensor, known_mask: Tensor, *, schedule: NoiseSchedule, timesteps: Tensor
) -> Callback:
    """A sampler's callback that puts the known part back after every step, noised to the level that x is at.

    The replacement of Lugmayr et al. 2022, arXiv 2201.09865, Eq. 8, always with the same noise: what is known then
    moves along the straight path from that noise, as it does under a deterministic sampler. After the last step it is
    `clean`, exactly.

    Args:
        clean: known latents (b, f, c, h, w); any values where nothing is known.
        noise: standard normal, of the same shape.
        known_mask: bool, True where `clean` stays; broadcasts to that shape.
        timesteps: (steps,), those of the sampler.
    """
    levels = [*schedule.alpha_at(timesteps).tolist()[1:], 1.0]

    def restore(step: int, timestep: int, x: Tensor) -> None:
        x.copy_(torch.where(known_mask, noised(clean, noise, levels[step]), x))

    return restore


def encode_known(
    inputs: PixelInputs,
    vae: VAE,
    *,
    frames: int,
    clips: int,
    device: torch.device,
    video_latents: Tensor | None = None,
) -> KnownFrames:
    """Pixels as latents: the video with its mask, or the pictures at either end of the clip.

    A video that is to be extended is all that `clean` holds.
    """

    def encode(video: Tensor) -> Tensor:
        latents = vae.encode_video(video.to(device)).float()
        return repeat(latents, "b f c h w -> (v b) f c h w", v=clips // len(latents))

    if inputs.video is None:
        first, last = (encode(i) if i is not None else None for i in (inputs.image, inputs.last_image))
        return interpolate_ends(first, last, frames, ramp=inputs.image_ramp)
    known_mask = None
    if inputs.mask is not None:
        known_mask = ~downsample_mask(inputs.mask, vae.config.downsampling).to(device)
    clean = encode(inputs.video) if video_latents is None else video_latents
    if clean.shape[1] == 1 and not inputs.extend:
        clean = repeat(clean, "b 1 c h w -> b f c h w", f=frames)
    return KnownFrames(clean, known_mask=known_mask)


def interpolate_ends(first: Tensor | None, last: Tensor | None, frames: int, *, ramp: float) -> KnownFrames:
    """Known frames at the beginning (b, k, c, h, w) or the end, and others that start off like them.

    A frame begins as a mixture of the nearest on either side, the nearer one prevailing. What is left of it falls
    from 1 to 0 in `ramp` frames.
    """
    frame = torch.arange(frames)
    after = frame - (first.shape[1] - 1) if first is not None else None  # frames since the last one at the beginning
    before = frames - last.shape[1] - frame if last is not None else None  # frames until the first one at the end
    distances = [distance for distance in (after, before) if distance is not None]
    weight = torch.stack([(1 - d.clamp(min=0) / ramp).clamp(min=0) for d in distances]).amax(dim=0)
    known = torch.stack([d <= 0 for d in distances]).any(dim=0)
    if first is not None and last is not None:
        part = (after / (after + before)).clamp(0, 1).to(first).reshape(-1, 1, 1, 1)
        middle = torch.lerp(first[:, -1:], last[:, :1], part)
    else:
        edge = first[:, -1:] if first is not None else last[:, :1]  # type: ignore[index]
        middle = edge.expand(-1, frames, -1, -1, -1)
    clean = middle.clone()
    if first is not None:
        clean[:, : first.shape[1]] = first
    if last is not None:
        clean[:, frames - last.shape[1] :] = last
    return KnownFrames(clean, weight, known.reshape(-1, 1, 1, 1).to(clean.device))


def downsample_mask(mask: Tensor, downsampling: int) -> Tensor:
    """bool (b, f, 1, h, w): latent pixels of which any pixel is to be painted anew."""
    flat = rearrange(mask.float(), "b f 1 h w -> b f h w")
    return rearrange(F.max_pool2d(flat, downsampling) > 0, "b f h w -> b f 1 h w")
