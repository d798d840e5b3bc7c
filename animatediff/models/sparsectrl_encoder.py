"""SparseCtrl (arXiv 2311.16933): an encoder that steers a video UNet by a few given frames of the clip.

A ControlNet (arXiv 2302.05543) whose motion modules carry what is given to the frames without an image. Instead of the
noisy latents it sees zeros (sec. 3.2), so its output depends on the timestep, the text and the condition alone.
Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from animatediff_kernels.cpu import laid_out
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import MOTION_VERSIONS, MotionConfig, SparseCtrlConfig
from animatediff.models.controlnet_network import PixelEmbedding, ResidualEncoder, copy_encoder, pixel_widths, zero
from animatediff.models.unet import UNet


class SparseCtrl(ResidualEncoder):
    """The residuals that a condition adds to a UNet's skip connections. Freshly built ones are all zero."""

    def __init__(self, config: SparseCtrlConfig):
        unet, inputs = config.unet, config.condition_channels + 1  # the mask of given frames comes last
        if config.pixel_channels:
            condition: nn.Module = PixelEmbedding(inputs, config.pixel_channels, unet.block_out_channels[0])
        else:
            condition = zero(nn.Conv2d(inputs, unet.block_out_channels[0], 3, padding=1))
        super().__init__(unet, condition)
        self.config = config

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
        # conv_in of zeros is its bias; its weights are in the official files and have no effect.
        h = rearrange(embedded, "b f c h w -> (b f) c h w") + self.conv_in.bias[:, None, None]
        h = laid_out(h, self.conv_in.weight)
        return self.residuals(h, t, context, embedded.shape[1])


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
        pixel_channels=pixel_widths(downsampling) if pixels else (),
    )
    return copy_encoder(SparseCtrl(config), unet)
