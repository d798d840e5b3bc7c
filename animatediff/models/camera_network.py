"""CameraCtrl (arXiv 2404.02101): the rays of a moving camera, encoded and added inside the motion modules.

Parameter names are the official file's; the layers that merge the camera into an attention are numbered here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import MOTION_VERSIONS, CameraConfig
from animatediff.models.motion import TemporalAttention, TemporalTransformerBlock
from animatediff.models.t2i_adapter import AdapterBlock
from animatediff.models.unet import UNet

RAY_CHANNELS = 6  # of a Plücker embedding
BLOCKS = 2  # per level


class PoseEncoder(nn.Module):
    """Features of a camera's rays, one map for each level and frame."""

    def __init__(self, config: CameraConfig):
        super().__init__()
        channels = config.block_out_channels
        temporal = replace(MOTION_VERSIONS["v3"], num_heads=config.num_heads, attentions_per_block=1)
        self.downsampling = config.downsampling
        self.encoder_conv_in = nn.Conv2d(RAY_CHANNELS * config.downsampling**2, channels[0], 3, padding=1)
        self.encoder_down_conv_blocks = nn.ModuleList()
        self.encoder_down_attention_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            first = AdapterBlock(before, width, halve=level > 0)
            self.encoder_down_conv_blocks.append(nn.ModuleList([first, AdapterBlock(width, width, halve=False)]))
            self.encoder_down_attention_blocks.append(
                nn.ModuleList(TemporalTransformerBlock(width, temporal) for _ in range(BLOCKS))
            )

    def forward(self, rays: Tensor) -> list[Tensor]:
        """One map (f, c, h, w) for each level of the UNet, rounded down where the UNet rounds up.

        Args:
            rays: (f, 6, H, W) of `plucker_embedding`, at most as many frames as it was trained with.
        """
        frames = len(rays)
        x = self.encoder_conv_in(F.pixel_unshuffle(rays, self.downsampling))
        features = []
        for convs, attentions in zip(self.encoder_down_conv_blocks, self.encoder_down_attention_blocks, strict=True):
            for conv, attention in zip(convs, attentions, strict=True):
                x = conv(x)
                tokens = attention(rearrange(x, "f c h w -> f (h w) c"), frames)
                x = rearrange(tokens, "f (h w) c -> f c h w", h=x.shape[-2])
            features.append(x)
        return features


class CameraCtrl(nn.Module):
    """`pose_encoder`, and in `merges` a layer for each motion module on the way down and up, in that order."""

    def __init__(self, config: CameraConfig):
        super().__init__()
        self.config = config
        self.pose_encoder = PoseEncoder(config)
        self.merges = nn.ModuleList(nn.Linear(width, width) for width in config.merge_widths)


def merged_attentions(unet: UNet) -> dict[str, tuple[int, TemporalAttention]]:
    """By name, the level and the first temporal attention of each motion module that CameraCtrl merges into."""
    levels = len(unet.config.block_out_channels)
    found = {}
    for half, level_of in (("down_blocks", lambda i: i), ("up_blocks", lambda i: levels - 1 - i)):
        for i, block in enumerate(getattr(unet, half)):
            for j, module in enumerate(block.motion_modules or ()):
                name = f"{half}.{i}.motion_modules.{j}.temporal_transformer.transformer_blocks.0.attention_blocks.0"
                attention = module.temporal_transformer.transformer_blocks[0].attention_blocks[0]
                found[name] = (level_of(i), attention)
    return found


class CameraFeatures:
    """What the motion modules are told of the camera.

    Attributes:
        values: one map (f, c, h, w) for each level, for the frames that the network sees now.
        scale: 1 as trained, 0 nothing.
    """

    def __init__(self, scale: float = 1.0):
        self.values: Sequence[Tensor] = ()
        self.scale = scale


@contextmanager
def camera_merged(unet: UNet, camera: CameraCtrl, features: CameraFeatures) -> Iterator[None]:
    """Merge a camera into the first temporal attention of each motion module: h + scale * merge(h + feature).

    h are the tokens with their positions in them; queries, keys and values are all made of the sum.
    """
    with ExitStack() as stack:
        for merge, (level, attention) in zip(camera.merges, merged_attentions(unet).values(), strict=True):

            def add(module: nn.Module, args: tuple, merge: nn.Module = merge, level: int = level) -> tuple:
                tokens = args[0]
                feature = rearrange(features.values[level], "f c h w -> f (h w) c")
                told = tokens + feature.repeat(len(tokens) // len(feature), 1, 1)
                return (tokens + features.scale * merge(told), *args[1:])

            stack.callback(attention.register_forward_pre_hook(add).remove)
        yield
