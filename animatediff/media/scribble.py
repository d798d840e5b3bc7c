"""Drawings from pictures: white lines on black along the edges, what a SparseCtrl for scribbles learns from."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = (1.0, 4.0, 6.0, 4.0, 1.0)  # pixels; what is finer than this is texture and is not drawn
FAINT = 0.04  # change from pixel to pixel, of a range of 2, that is no edge anywhere,
WEAK = 0.2  # nor is this share of the steepest change in the picture
LINE = 256  # lines are one or two pixels wide, and a pixel wider to both sides for every so many of the shorter side


@torch.no_grad()
def draw_scribbles(video: Tensor) -> Tensor:
    """Lines along the edges of each frame, found as by Canny (1986) without his last step, hysteresis.

    An edge is where a slightly blurred picture changes most along its gradient, in the channel that changes most.

    Args:
        video: (…, 3, H, W), range [-1, 1].

    Returns:
        bool (…, H, W), True on lines.
    """
    frames = video.flatten(0, -4).float()
    blur = frames.new_tensor(BLUR) / sum(BLUR)
    slope = frames.new_tensor((-0.5, 0.0, 0.5))
    smooth = _along(_along(frames, blur, 3), blur, 2)
    dx, dy = _along(smooth, slope, 3), _along(smooth, slope, 2)
    steep, channel = torch.hypot(dx, dy).max(dim=1, keepdim=True)
    sideways = (dx.gather(1, channel).abs() >= dy.gather(1, channel).abs()).expand_as(steep)
    crest = torch.where(sideways, _highest(steep, (1, 3)), _highest(steep, (3, 1)))
    least = (WEAK * steep.amax(dim=(2, 3), keepdim=True)).clamp(min=FAINT)
    lines = (crest & (steep > least)).float()
    wider = round(min(video.shape[-2:]) / LINE)
    lines = F.max_pool2d(lines, 2 * wider + 1, stride=1, padding=wider)
    return (lines > 0).reshape(*video.shape[:-3], *video.shape[-2:])


def pack(lines: Tensor) -> Tensor:
    """bool (…, W) as bits, uint8 (…, ceil(W / 8))."""
    return torch.from_numpy(np.packbits(lines.cpu().numpy(), axis=-1))


def unpack(bits: Tensor, width: int) -> Tensor:
    """The bool (…, width) that `pack` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width)).bool()


def _along(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Correlation of (n, c, h, w) with a kernel (k,) along one axis; the border is repeated."""
    side, channels = len(kernel) // 2, x.shape[1]
    padding = (side, side, 0, 0) if dim == 3 else (0, 0, side, side)
    weight = kernel.view(1, 1, 1, -1) if dim == 3 else kernel.view(1, 1, -1, 1)
    return F.conv2d(F.pad(x, padding, mode="replicate"), weight.expand(channels, -1, -1, -1), groups=channels)


def _highest(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Where (n, 1, h, w) is the highest in a window around; both sides of a symmetric edge are."""
    return x >= 0.98 * F.max_pool2d(x, window, stride=1, padding=(window[0] // 2, window[1] // 2))
