"""IFNet of RIFE 4 (arXiv 2011.06294, and hzwer's Practical-RIFE): a frame between two others, at any time.

Two flows, from the frame asked for to either neighbour, and a mask of which neighbour to believe are found from coarse
to fine; every block corrects the flows of the one before, looking at both neighbours moved by them. Parameter names are
the files'. What differs between releases are rows of VERSIONS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.media.interpolate import moved

DEPTH = 8  # residual layers of a block
CARRIED = 8  # channels that a block hands to the next one beside flows and mask
SLOPE = 0.2


@dataclass(frozen=True)
class IFNetConfig:
    """What differs between releases.

    Attributes:
        widths: channels of each block.
        encoder: names of the layers that see each frame alone, empty if there are none.
        encoder_width, features: channels inside of them, and that the blocks get of each frame.
        spare: channels that come out beside flows and mask: CARRIED are handed on, fewer are not used.
        scales: how many times smaller than the frames a block sees them.
    """

    widths: tuple[int, ...] = (192, 128, 96, 64)
    encoder: tuple[str, ...] = ()
    encoder_width: int = 0
    features: int = 0
    spare: int = 1
    scales: tuple[int, ...] = (8, 4, 2, 1)

    @property
    def carries(self) -> bool:
        return self.spare == CARRIED

    @property
    def multiple(self) -> int:
        """What the sides of frames have to be multiples of: a block halves twice what it sees."""
        return 4 * max(self.scales)


_PAIR, _NUMBERED, _NAMED = ("0", "1"), ("0", "2", "4", "6"), ("cnn0", "cnn1", "cnn2", "cnn3")
_LITE, _WIDE, _FIVE = (128, 96, 64, 48), (256, 192, 96, 48), (192, 128, 96, 64, 32)
VERSIONS = {
    "4.5": IFNetConfig(spare=0),
    "4.6": IFNetConfig(),
    "4.7 to 4.9": IFNetConfig(encoder=_PAIR, encoder_width=16, features=4),
    "4.10 to 4.13": IFNetConfig(encoder=_NUMBERED, encoder_width=32, features=8),
    "4.12 and 4.13 lite": IFNetConfig(_LITE, _NUMBERED, 32, 4),
    "4.14 to 4.19, 4.24": IFNetConfig(encoder=_NAMED, encoder_width=32, features=8),
    "4.15 to 4.17 lite": IFNetConfig(_LITE, _NAMED, 16, 4),
    "4.20": IFNetConfig((384, 192, 96, 48), _NAMED, 32, 8),
    "4.21 to 4.23": IFNetConfig(_WIDE, _NAMED, 32, 8, CARRIED),
    "4.22 lite": IFNetConfig((192, 128, 64, 32), _NAMED, 16, 4, CARRIED),
    "4.25 and 4.26": IFNetConfig(_FIVE, _NAMED, 16, 4, CARRIED, (16, 8, 4, 2, 1)),
    "4.25 lite": IFNetConfig((192, 128, 96, 64, 24), _NAMED, 16, 4, CARRIED, (32, 16, 8, 4, 1)),
}


class ResidualConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x) * self.beta + x, SLOPE)


class FlowBlock(nn.Module):
    """Flows, mask and spare channels (n, 5 + spare, H, W) from channels of frames, seen `scale` times smaller."""

    def __init__(self, inputs: int, width: int, spare: int, scale: int):
        super().__init__()
        self.scale = scale
        self.conv0 = nn.Sequential(_halved(inputs, width // 2), _halved(width // 2, width))
        self.convblock = nn.Sequential(*(ResidualConv(width) for _ in range(DEPTH)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, 4 * (5 + spare), 4, 2, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor, flow: Tensor | None) -> Tensor:
        x = _resized(x, 1 / self.scale)
        if flow is not None:
            x = torch.cat([x, _resized(flow, 1 / self.scale) / self.scale], dim=1)
        out = _resized(self.lastconv(self.convblock(self.conv0(x))), self.scale)
        return torch.cat([out[:, :4] * self.scale, out[:, 4:]], dim=1)


class IFNet(nn.Module):
    def __init__(self, config: IFNetConfig):
        super().__init__()
        self.config = c = config
        first = 2 * (3 + c.features) + 1  # both frames, their features, the time
        later = first + 5 + CARRIED * c.carries  # and the mask, flows, and what the block before hands on
        for i, (width, scale) in enumerate(zip(c.widths, c.scales, strict=True)):
            self.add_module(f"block{i}", FlowBlock(later if i else first, width, c.spare, scale))
        if c.encoder:
            self.encode = _encoder(c.encoder, c.encoder_width, c.features)

    def forward(self, first: Tensor, last: Tensor, times: Tensor) -> Tensor:
        """Frames (n, 3, H, W) in [0, 1] at `times` (n, 1), 0 … 1, between two of that shape.

        Sides are multiples of `config.multiple`.
        """
        time = times[:, :, None, None].expand(-1, -1, *first.shape[-2:])
        ends = [torch.cat([x, self.encode(x)], dim=1) if self.config.encoder else x for x in (first, last)]
        flow = mask = carried = None
        a, b = ends
        for i in range(len(self.config.widths)):
            given = [a[:, :3], b[:, :3], a[:, 3:], b[:, 3:], time, *(x for x in (mask, carried) if x is not None)]
            change, new_mask, spare = self.get_submodule(f"block{i}")(torch.cat(given, dim=1), flow).split(
                [4, 1, self.config.spare], dim=1
            )
            flow = change if flow is None else flow + change
            summed = mask is not None and not self.config.encoder  # of the releases without an encoder
            mask = mask + new_mask if summed else new_mask
            carried = spare if self.config.carries else None
            a, b = moved(ends[0], flow[:, :2]), moved(ends[1], flow[:, 2:])
        return torch.lerp(b[:, :3], a[:, :3], torch.sigmoid(mask))


def _halved(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LeakyReLU(SLOPE))


def _encoder(names: tuple[str, ...], width: int, features: int) -> nn.Sequential:
    """Convolutions of these names, activations between them unless there are but two."""
    layers = nn.Sequential()
    for i, name in enumerate(names):
        if i and len(names) > 2:
            layers.add_module(f"before {name}", nn.LeakyReLU(SLOPE))
        if i == len(names) - 1:
            layers.add_module(name, nn.ConvTranspose2d(width, features, 4, 2, 1))
        else:
            layers.add_module(name, nn.Conv2d(width if i else 3, width, 3, 1 if i else 2, 1))
    return layers


def _resized(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
