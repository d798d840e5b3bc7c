"""Building blocks shared by the UNet and the VAE: GroupNorm over a frame or a clip, ResNet block, resampling.

Activations are `(b f) c h w` throughout: frames ride in the batch axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from animatediff_kernels import group_norm_silu, layer_norm
from animatediff_kernels.cpu import left_alone, takes_channels_last
from animatediff_kernels.cpu_convolutions import conv2d, conv_choice, upsampled_conv3x3, winograd
from animatediff_kernels.group_norm_silu.channels_last import channel_affine
from torch import Tensor, nn

from animatediff.models.chunks import Chunked, in_parts

CPU_PIXELS = 2**16  # of the images that a ResNet block takes at a time, if they are more: as fast, and less is kept


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

    def forward(self, x: Tensor, frames: int = 1, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        """Of x + shift where there is a shift (b, c), one row per video."""
        pooled, affine = frames if self.over_frames else 1, (self.weight, self.bias)
        return group_norm_silu(x, self.num_groups, *affine, eps=self.eps, frames=pooled, silu=silu, shift=shift)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of tokens ((b f), s, c), plus the positional encoding (f, c) of each token's frame if there is one."""

    def forward(self, x: Tensor, positional_encoding: Tensor | None = None) -> Tensor:
        return layer_norm(x, self.weight, self.bias, code=positional_encoding, eps=self.eps)


class Conv(nn.Conv2d):
    """A convolution of square kernels; on a CPU, without gradients, by Winograd or as a product where that pays."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int | None = None
    ):
        """`padding`: by default what keeps height and width."""
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, **self.placing())

    def placing(self) -> dict[str, int]:
        """Where the kernel is put: stride and padding, as `conv2d` takes them."""
        return {"stride": self.stride[0], "padding": int(self.padding[0])}


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer can be computed from its weights: nothing stands in its place (a LoRA) or hooks into it."""
    return type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks


def norm_conv(norm: GroupNorm, conv: Conv, x: Tensor, frames: int, shift: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x + shift))); on a CPU, where Winograd pays, what is normalised is never in memory as a whole."""
    plain = is_plain(norm, GroupNorm) and is_plain(conv, Conv) and takes_channels_last(x)
    if not plain or conv_choice(x, conv.weight, **conv.placing()).backend != "winograd":
        return conv(norm(x, frames, silu=True, shift=shift))
    pooled = frames if norm.over_frames else 1
    before = channel_affine(x, norm.weight, norm.bias, shift, num_groups=norm.num_groups, eps=norm.eps, frames=pooled)
    return winograd(x, conv.weight, conv.bias, before=before)


class ResnetBlock(Chunked):
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
        self.conv1 = Conv(in_channels, out_channels, 3)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, over_frames=norm_over_frames)
        self.conv2 = Conv(out_channels, out_channels, 3)
        self.conv_shortcut = Conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None, frames: int = 1) -> Tensor:
        """x: ((b f), c, h, w); time: (b, time_channels), one row per video."""
        pixels = self.chunk or (0 if left_alone(x, self.conv1.weight) else CPU_PIXELS)
        images = pixels // x.shape[-2:].numel() if pixels else len(x)
        if self.norm1.over_frames:  # whose statistics need whole clips
            images -= images % frames
            images = max(images, frames)
        if images >= len(x):
            return self._forward(x, time, frames)
        if time is None:
            return in_parts(lambda x: self._forward(x, None, frames), max(images, 1), x)
        rows = time.repeat_interleave(len(x) // len(time), dim=0)
        return in_parts(lambda x, rows: self._forward(x, rows, frames), max(images, 1), x, rows)

    def _forward(self, x: Tensor, time: Tensor | None, frames: int) -> Tensor:
        y = norm_conv(self.norm1, self.conv1, x, frames)
        shift = None
        if self.time_emb_proj is not None:
            assert time is not None
            shift = self.time_emb_proj(F.silu(time))
        y = norm_conv(self.norm2, self.conv2, y, frames, shift)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        own = is_plain(self.conv2, Conv) and not torch.is_grad_enabled()  # nobody else has seen y
        return y.add_(x) if own and y.dtype == x.dtype else y + x


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on all sides (UNet) or only right and below (`asymmetric`, VAE encoder)."""

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(Chunked):
    """Nearest-neighbour resize to `size` (twice as large by default), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv(channels, channels, 3)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        twice = (2 * x.shape[-2], 2 * x.shape[-1])
        size = size or twice
        images = max(self.chunk // (size[0] * size[1]), 1) if self.chunk else len(x)
        return in_parts(lambda x: self._forward(x, size, twice), images, x)

    def _forward(self, x: Tensor, size: tuple[int, int], twice: tuple[int, int]) -> Tensor:
        if size == twice and is_plain(self.conv, Conv) and not left_alone(x, self.conv.weight):
            return upsampled_conv3x3(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
