"""SparseCtrl (arXiv 2311.16933): an encoder that steers a video UNet by a few given frames of the clip.

A ControlNet (arXiv 2302.05543) whose motion modules carry what is given to the frames without an image. Instead of the
noisy latents it sees zeros (sec. 3.2), so its output depends on the timestep, the text and the condition alone.
Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import MOTION_VERSIONS, MotionConfig, SparseCtrlConfig
from animatediff.models.layers import TimestepEmbedding, timestep_embedding
from animatediff.models.unet import DownBlock, MidBlock, UNet

PIXEL_CHANNELS = (16, 32, 96, 256)  # of the official scribble encoder; each after the first halves the size


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


class SparseCtrl(nn.Module):
    """The residuals that a condition adds to a UNet's skip connections. Freshly built ones are all zero."""

    def __init__(self, config: SparseCtrlConfig):
        super().__init__()
        self.config = config
        unet = config.unet
        channels, inputs = unet.block_out_channels, config.condition_channels + 1  # the mask of given frames comes last
        self.conv_in = nn.Conv2d(unet.in_channels, channels[0], 3, padding=1)
        if config.pixel_channels:
            self.controlnet_cond_embedding: nn.Module = PixelEmbedding(inputs, config.pixel_channels, channels[0])
        else:
            self.controlnet_cond_embedding = zero(nn.Conv2d(inputs, channels[0], 3, padding=1))
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])
        self.down_blocks = nn.ModuleList(DownBlock(unet, level) for level in range(len(channels)))
        self.mid_block = MidBlock(unet)
        skips = [channels[0]]
        for level, width in enumerate(channels):
            skips += [width] * (unet.layers_per_block + (level < len(channels) - 1))
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in skips)
        self.controlnet_mid_block = zero(nn.Conv2d(channels[-1], channels[-1], 1))

    def embed(self, condition: Tensor, given: Tensor) -> Tensor:
        """What `forward` takes, ((b f), c, h, w) in latents' size, each frame for itself.

        Args:
            condition: (n, condition_channels, H, W), zero in frames that are not given: pixels in [0, 1] for scribble,
                scaled latents for rgb.
            given: (n,), 1 in given frames, else 0.
        """
        mask = given.to(condition)[:, None, None, None].expand(-1, 1, *condition.shape[-2:])
        return self.controlnet_cond_embedding(torch.cat([condition, mask], dim=1))

    def forward(self, embedded: Tensor, t: Tensor, context: Tensor) -> tuple[list[Tensor], Tensor]:
        """`down_residuals` and `mid_residual` of `UNet.forward`.

        Args:
            embedded: condition (b, f, c, h, w) of `embed`.
            t: timesteps (b,), 0 … 999.
            context: text embedding (b, l, context_dim), one row per video, or (b, f, l, context_dim), one per frame.
        """
        frames = embedded.shape[1]
        context = context.flatten(0, -3)
        time = self.time_embedding(timestep_embedding(t, self.config.unet.block_out_channels[0]).to(embedded.dtype))
        # conv_in of zeros is its bias; its weights are in the official files and have no effect.
        h = rearrange(embedded, "b f c h w -> (b f) c h w") + self.conv_in.bias[:, None, None]
        skips = [h]
        for block in self.down_blocks:
            h = block(h, time, context, frames, skips)
        h = self.mid_block(h, time, context, frames)
        heads = zip(self.controlnet_down_blocks, skips, strict=True)
        return [head(skip) for head, skip in heads], self.controlnet_mid_block(h)


def build_sparsectrl(
    unet: UNet, kind: str, *, downsampling: int = 8, latent_channels: int = 4, motion: MotionConfig | None = None
) -> SparseCtrl:
    """A SparseCtrl to train: the encoder of an image model, on its device and in its dtype, that changes nothing yet.

    Args:
        unet: its weights are copied; its motion modules, if it has any, are left out.
        kind: "rgb" or "scribble".
        downsampling: pixels per latent cell and side.
        latent_channels: of the VAE, for rgb.
        motion: sizes of its motion modules; by default in all levels, with the heads of `unet`.
    """
    levels = len(unet.config.block_out_channels)
    motion = motion or replace(
        MOTION_VERSIONS["sparsectrl"],
        num_heads=unet.config.num_heads,
        resolutions=tuple(2**level for level in range(levels)),
    )
    pixels = kind == "scribble"
    config = SparseCtrlConfig(
        unet=unet.config.with_motion(motion),
        condition_channels=3 if pixels else latent_channels,
        pixel_channels=PIXEL_CHANNELS[: round(math.log2(downsampling)) + 1] if pixels else (),
    )
    encoder = SparseCtrl(config).to(unet.conv_in.weight)
    image = {key: tensor for key, tensor in unet.state_dict().items() if "motion_modules." not in key}
    known = encoder.state_dict().keys()
    missing, _ = encoder.load_state_dict({key: image[key] for key in image.keys() & known}, strict=False)
    assert all("motion_modules." in key or key.startswith("controlnet_") for key in missing)
    return encoder


def zero(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
