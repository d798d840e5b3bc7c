"""ControlNet (arXiv 2302.05543): the way down of an image UNet, steered by one hint image for each frame.

It knows no motion: frames are independent images to it, so a frame's residuals are the same in every window of frames.
Parameter names are diffusers'.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from animatediff_kernels.cpu import laid_out, with_fast_products
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import ControlNetConfig, UNetConfig
from animatediff.models.layers import Conv, TimestepEmbedding
from animatediff.models.unet import DownBlock, MidBlock, UNet, embed_time

PIXEL_WIDTHS = (16, 32, 96, 256)  # of the released encoders of pixels; each after the first halves the size


class PixelEmbedding(nn.Module):
    """A small CNN from pixels to the size of latents."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in zip(widths, widths[1:], strict=False):
            self.blocks += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        zero(self.conv_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ResidualEncoder(nn.Module):
    """The way down and the middle of a UNet, and a 1x1 convolution for every skip connection.

    Args:
        unet: sizes of the UNet, with the motion modules the encoder is to have.
        condition: the network that embeds the condition, to be added after `conv_in`.
    """

    def __init__(self, unet: UNetConfig, condition: nn.Module):
        super().__init__()
        channels = unet.block_out_channels
        self.conv_in = nn.Conv2d(unet.in_channels, channels[0], 3, padding=1)
        self.controlnet_cond_embedding = condition
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.add_embedding = TimestepEmbedding(unet.added_channels, 4 * channels[0]) if unet.added_channels else None
        self.down_blocks = nn.ModuleList(DownBlock(unet, level) for level in range(len(channels)))
        self.mid_block = MidBlock(unet)
        skips = [channels[0]]
        for level, width in enumerate(channels):
            skips += [width] * (unet.layers_per_block + (level < len(channels) - 1))
        self.controlnet_down_blocks = nn.ModuleList(zero(Conv(width, width, 1)) for width in skips)
        self.controlnet_mid_block = zero(Conv(channels[-1], channels[-1], 1))

    @with_fast_products
    def residuals(
        self,
        h: Tensor,
        t: Tensor,
        context: Tensor,
        frames: int,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """`down_residuals` and `mid_residual` of `UNet.forward` from what stands after `conv_in`, ((b f), c, h, w)."""
        context = context.flatten(0, -3)
        time = embed_time(self, t, pooled, time_ids, h.dtype)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, time, context, frames, skips)
        h = self.mid_block(h, time, context, frames)
        heads = zip(self.controlnet_down_blocks, skips, strict=True)
        return [head(skip) for head, skip in heads], self.controlnet_mid_block(h)


E = TypeVar("E", bound=ResidualEncoder)


class ControlNet(ResidualEncoder):
    """The residuals that hint images add to a UNet's skip connections. Freshly built ones are all zero."""

    def __init__(self, config: ControlNetConfig):
        unet = config.unet.with_motion(None)
        hint = PixelEmbedding(config.hint_channels, config.hint_widths, unet.block_out_channels[0])
        super().__init__(unet, hint)
        self.config = config

    def embed(self, hint: Tensor) -> Tensor:
        """What `forward` takes, (n, c, h, w) in latents' size. It depends on the hint alone.

        Args:
            hint: (n, hint_channels, H, W), range [0, 1]; -1 marks what is to be painted anew (inpainting).
        """
        return self.controlnet_cond_embedding(hint.flip(1) if self.config.bgr else hint)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, embedded: Tensor, **added: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """`down_residuals` and `mid_residual` of `UNet.forward`; of size 1x1 where the config says `pooled`.

        Args:
            x: noisy latents (b, f, in_channels, h, w).
            t: timesteps (b,), 0 … 999.
            context: text embedding (b, l, context_dim), one row per video, or (b, f, l, context_dim), one per frame.
            embedded: hints of `embed`, ((b f), c, h, w), or (f, c, h, w), the same for every video.
            added: `pooled` and `time_ids` of `UNet.forward`, for SDXL.
        """
        frames = x.shape[1]
        h = self.conv_in(laid_out(rearrange(x, "b f c h w -> (b f) c h w"), self.conv_in.weight))
        h = h + embedded.repeat(len(h) // len(embedded), 1, 1, 1)
        down, mid = self.residuals(h, t, context, frames, **added)
        if not self.config.pooled:
            return down, mid
        return [residual.mean((2, 3), keepdim=True) for residual in down], mid.mean((2, 3), keepdim=True)


def build_controlnet(unet: UNet, *, downsampling: int = 8) -> ControlNet:
    """A ControlNet to train: the encoder of an image model, on its device and in its dtype, that changes nothing yet.

    Args:
        unet: its weights are copied; its motion modules, if it has any, are left out.
        downsampling: pixels per latent cell and side.
    """
    config = ControlNetConfig(unet.config.with_motion(None), hint_widths=pixel_widths(downsampling))
    return copy_encoder(ControlNet(config), unet)


def pixel_widths(downsampling: int) -> tuple[int, ...]:
    """Widths of a fresh CNN from pixels to latents."""
    return PIXEL_WIDTHS[: round(math.log2(downsampling)) + 1]


def copy_encoder(encoder: E, unet: UNet) -> E:
    """Give an encoder the weights of an image model's way down, its device and dtype; motion modules stay fresh."""
    image = {key: tensor for key, tensor in unet.state_dict().items() if "motion_modules." not in key}
    known = encoder.state_dict().keys()
    missing, _ = encoder.load_state_dict({key: image[key] for key in image.keys() & known}, strict=False)
    assert all("motion_modules." in key or key.startswith("controlnet_") for key in missing)
    return encoder.to(unet.conv_in.weight)


def guess_weights(residuals: int) -> list[float]:
    """Factors of the residuals in guess mode, from the first skip to the middle block: 0.1 … 1, as in diffusers.

    The original's are 0.825^n … 1, which is nearly the same: these have a ratio of 0.8254.
    """
    return torch.logspace(-1, 0, residuals).tolist()


def zero(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
