"""Building blocks shared by the UNet and the VAE: GroupNorm over a frame or a clip, ResNet block, resampling.

Activations are `(b f) c h w` throughout: frames ride in the batch axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [cos, sin] of timesteps, max period 10,000 (Ho et al. 2020). t: (b,). Returns (b, dim)."""
    half = dim // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.float()[:, None] * exponent.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GroupNorm(nn.GroupNorm):
    """GroupNorm of `(b f) c h w` whose statistics cover one frame, or with `over_frames` all frames of a clip."""

    def __init__(self, groups: int, channels: int, *, eps: float, over_frames: bool = False):
        super().__init__(groups, channels, eps=eps)
        self.over_frames = over_frames

    def forward(self, x: Tensor, frames: int = 1) -> Tensor:
        if not self.over_frames or frames == 1:
            return super().forward(x)
        h, w = x.shape[-2:]
        clip = rearrange(x, "(b f) c h w -> b c f (h w)", f=frames)
        return rearrange(super().forward(clip), "b c f (h w) -> (b f) c h w", h=h, w=w)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU; the time embedding is added between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        norm_over_frames: bool = False,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, over_frames=norm_over_frames)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, over_frames=norm_over_frames)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None, frames: int = 1) -> Tensor:
        """x: ((b f), c, h, w); time: (b, time_channels), one row per video."""
        y = self.conv1(F.silu(self.norm1(x, frames)))
        if self.time_emb_proj is not None:
            assert time is not None
            shift = self.time_emb_proj(F.silu(time)).repeat_interleave(frames, dim=0)
            y = y + shift[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y, frames)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on all sides (UNet) or only right and below (`asymmetric`, VAE encoder)."""

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour resize to `size` (twice as large by default), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
