"""The block that T2I-Adapter's encoders of pictures are built of, and CameraCtrl's and AnimateLCM-I2V's after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class AdapterBlock(nn.Module):
    """T2I-Adapter's residual block (arXiv 2302.08453): two convolutions, after 2x2 average pooling with `halve`."""

    def __init__(self, in_channels: int, out_channels: int, *, halve: bool):
        super().__init__()
        self.halve = halve
        self.in_conv = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.block1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.block2 = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.halve:
            x = F.avg_pool2d(x, 2)
        if self.in_conv is not None:
            x = self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))
