"""TAESD's decoder (Bohan 2023, github.com/madebyollin/taesd): latents to pixels, for a quick look.

Parameter names are those of diffusers' AutoencoderTiny.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, BLOCKS = 64, (3, 3, 3, 1)  # channels; residual blocks before each doubling, and after the last


class TinyBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    def __init__(self, latent_channels: int = 4):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, WIDTH, 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(BLOCKS):
            if i:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
            layers += [TinyBlock(WIDTH) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTH, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, 8 h, 8 w), about [-1, 1], of scaled latents (n, c, h, w)."""
        return self.layers(torch.tanh(latents / 3) * 3) * 2 - 1
