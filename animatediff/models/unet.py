"""The UNet of Stable Diffusion 1.x and XL, as an image model or, with motion modules, as a video model.

Frames ride in the batch axis, `(b f) c h w`; only motion modules and v1's GroupNorms look across them. Image layers
carry diffusers' parameter names, motion modules the official AnimateDiff names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from animatediff_kernels.cpu import laid_out, laid_out_like, with_fast_products
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import UNetConfig
from animatediff.models.attention import SpatialTransformer
from animatediff.models.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)
from animatediff.models.motion import MotionModule
from animatediff.utils import UserError


class Block(nn.Module):
    """One resolution on the way down or up: per layer a ResNet block, a spatial transformer, a motion module."""

    def __init__(self, config: UNetConfig, widths: Sequence[tuple[int, int]], *, level: int, motion: bool):
        super().__init__()
        outs = [out for _, out in widths]
        self.resnets = nn.ModuleList(resnet_block(config, a, b) for a, b in widths)
        blocks = config.transformer_blocks(level)
        self.attentions = nn.ModuleList(SpatialTransformer(c, config, blocks) for c in outs) if blocks else None
        self.motion_modules = (
            nn.ModuleList(MotionModule(c, config.motion, groups=config.norm_num_groups) for c in outs)
            if motion and config.motion
            else None
        )

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor, frames: int) -> Tensor:
        x = self.resnets[i](x, time, frames)
        if self.attentions is not None:
            x = self.attentions[i](x, context)
        if self.motion_modules is not None:
            x = self.motion_modules[i](x, frames)
        return x


class DownBlock(Block):
    def __init__(self, config: UNetConfig, level: int):
        channels = config.block_out_channels
        c, previous = channels[level], channels[max(level - 1, 0)]
        widths = [(previous if i == 0 else c, c) for i in range(config.layers_per_block)]
        motion = config.motion is not None and 2**level in config.motion.resolutions
        super().__init__(config, widths, level=level, motion=motion)
        self.downsamplers = nn.ModuleList([Downsample(c)]) if level < len(channels) - 1 else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context, frames)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class UpBlock(Block):
    def __init__(self, config: UNetConfig, level: int):
        channels = config.block_out_channels
        c, previous = channels[level], channels[min(level + 1, len(channels) - 1)]
        skips = [c] * config.layers_per_block + [channels[max(level - 1, 0)]]
        widths = [((previous if i == 0 else c) + skip, c) for i, skip in enumerate(skips)]
        motion = config.motion is not None and config.motion.up_block_modules and 2**level in config.motion.resolutions
        super().__init__(config, widths, level=level, motion=motion)
        self.upsamplers = nn.ModuleList([Upsample(c)]) if level > 0 else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            skip = skips.pop()
            x = laid_out_like(x, skip)  # a map of 1x1 has no layout of its own
            x = self.layer(i, torch.cat([x, skip], dim=1), time, context, frames)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, skips[-1].shape[-2:])
        return x


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        c = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(resnet_block(config, c, c) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(c, config, config.transformer_blocks(-1))])
        self.motion_modules = (
            nn.ModuleList([MotionModule(c, config.motion, groups=config.norm_num_groups)])
            if config.motion and config.motion.mid_block
            else None
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time, frames), context)
        if self.motion_modules is not None:
            x = self.motion_modules[0](x, frames)
        return self.resnets[1](x, time, frames)


class UNet(nn.Module):
    """Predicts the noise (or v) of latents. Without `config.motion` the frames of a clip do not know each other."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        if len(config.attention_levels) != len(config.block_out_channels):
            raise ValueError(
                f"got {len(config.attention_levels)} attention_levels, expected {len(config.block_out_channels)}, "
                "one for each of block_out_channels"
            )
        self.config = config
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.add_embedding = (
            TimestepEmbedding(config.added_channels, 4 * channels[0]) if config.added_channels else None
        )
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(channels)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(channels))))
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, channels[0], eps=1e-5, over_frames=norms_over_frames(config)
        )
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def motion_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the motion modules."""
        return ((n, p) for n, p in self.named_parameters() if "motion_modules." in n)

    @with_fast_products
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        input_residual: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """Prediction (b, f, out_channels, h, w).

        Args:
            x: latents (b, f, in_channels, h, w), any h and w.
            t: timesteps (b,), 0 … 999.
            context: text embedding (b, l, context_dim), one row per video, or (b, f, l, context_dim), one per frame.
            pooled: for SDXL, pooled text embedding (b, d), one row per video, or (b, f, d), one per frame.
            time_ids: for SDXL, pixels (b, 6): original height, width; crop's top, left; target height, width. The
                refiner's last two are one aesthetic score.
            input_residual: added after `conv_in`, ((b f), c, h, w).
            down_residuals: added to the skip connections, each ((b f), c, h, w), first the one of `conv_in`.
            mid_residual: added after the middle block, ((b f), c, h, w).
        Raises: UserError for more frames than the motion module was trained with.
        """
        b, frames = x.shape[:2]
        motion = self.config.motion
        if motion and frames > motion.max_frames:
            raise UserError(
                f"got {frames} frames, expected at most {motion.max_frames}: the {motion.version} motion module was "
                f"trained with no more; make a shorter clip or set max_frames to go beyond at your own risk"
            )
        if context.dim() == 4:
            context = rearrange(context, "b f l d -> (b f) l d")
        time = embed_time(self, t, pooled, time_ids, x.dtype)
        h = self.conv_in(laid_out(rearrange(x, "b f c h w -> (b f) c h w"), self.conv_in.weight))
        if input_residual is not None:
            h = h + input_residual
        skips = [h]
        for block in self.down_blocks:
            h = block(h, time, context, frames, skips)
        if down_residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, down_residuals, strict=True)]
        h = self.mid_block(h, time, context, frames)
        if mid_residual is not None:
            h = h + mid_residual
        for block in self.up_blocks:
            h = block(h, time, context, frames, skips)
        h = self.conv_out(self.conv_norm_out(h, frames, silu=True))
        return rearrange(h, "(b f) c h w -> b f c h w", b=b).contiguous()


class Timed(Protocol):
    """A network that ResNets are told of the time in; of SDXL also of the text and of sizes."""

    conv_in: nn.Conv2d
    time_embedding: TimestepEmbedding
    add_embedding: TimestepEmbedding | None


def embed_time(network: Timed, t: Tensor, pooled: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What ResNets are told: rows (b, d) or, where pooled text varies over the frames, ((b f), d).

    SDXL (arXiv 2307.01952, sec. 2.2) adds to the timestep's embedding that of the pooled text and the numbers.
    """
    time = network.time_embedding(timestep_embedding(t, len(network.conv_in.weight)).to(dtype))
    if network.add_embedding is None:
        return time
    if pooled is None or time_ids is None:
        raise ValueError("got no pooled text or no time_ids, expected both: this network was trained with them")
    pooled = pooled.to(dtype).reshape(len(time), -1, pooled.shape[-1])
    width = (network.add_embedding.linear_1.weight.shape[1] - pooled.shape[-1]) // time_ids.shape[-1]
    numbers = timestep_embedding(time_ids.flatten(), width).view(len(time), 1, -1).to(dtype)
    added = network.add_embedding(torch.cat([pooled, numbers.expand(-1, pooled.shape[1], -1)], dim=-1))
    return (time[:, None] + added).flatten(0, 1)


def norms_over_frames(config: UNetConfig) -> bool:
    """Whether ResNet GroupNorms pool over the clip (v1 motion modules)."""
    return config.motion is not None and config.motion.resnet_norm_over_frames


def resnet_block(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        eps=1e-5,
        time_channels=4 * config.block_out_channels[0],
        norm_over_frames=norms_over_frames(config),
    )
