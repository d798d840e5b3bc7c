"""AnimateLCM-I2V (arXiv 2402.00769, sec. 4.3): features of a given picture, added to every level on the way down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.config.networks import UNetConfig
from animatediff.models.motion import positional_encoding
from animatediff.models.t2i_adapter import AdapterBlock
from animatediff.models.unet import UNet


class PictureEncoder(nn.Module):
    """Features of a picture, one map for each level and frame. Parameter names are the official file's."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.body = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            self.body += [AdapterBlock(before, width, halve=level > 0), AdapterBlock(width, width, halve=False)]

    def forward(self, latents: Tensor, drift: float) -> list[Tensor]:
        """One map (f, c, h, w) for each level of the UNet.

        Args:
            latents: (f, in_channels, h, w): scaled latents of the picture for each frame.
            drift: how far frames may go from the picture, 0 … 1.5; its authors' 0.8, less keeps more.
        """
        x = self.conv_in(latents)
        x = x + drift * positional_encoding(len(x), x.shape[1], x.device, x.dtype)[:, :, None, None]
        features = []
        for i, block in enumerate(self.body):
            if block.halve:  # the UNet rounds up
                x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")
            x = block(x)
            if i % 2:
                features.append(x)
        return features


class LevelFeatures:
    """What is added to the second layer of each level on the way down.

    Attributes:
        values: one map ((b f), c, h, w) for each level, for the frames that the network sees now.
    """

    def __init__(self) -> None:
        self.values: Sequence[Tensor] = ()


@contextmanager
def level_features_added(unet: UNet, features: LevelFeatures) -> Iterator[None]:
    """Add features after the image layers of the second layer of each down block and before its motion module."""
    with ExitStack() as stack:
        for level, block in enumerate(unet.down_blocks):

            def add(module: nn.Module, args: tuple, level: int = level) -> tuple:
                x = args[0]
                added = features.values[level]
                return (x + added.repeat(len(x) // len(added), 1, 1, 1), *args[1:])

            stack.callback(block.motion_modules[1].register_forward_pre_hook(add).remove)
        yield
