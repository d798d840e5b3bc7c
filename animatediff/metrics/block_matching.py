"""Optical flow by block matching, and what it leaves unexplained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 4  # pixels, both sides: every cell has one displacement
BLOCK = 3  # cells, both sides, that are matched together: the cell and its neighbours
REACH = 12  # pixels: the farthest displacement that is looked for, in x and in y
MIN_GAIN = 0.5  # share of the squared difference at rest that a displacement must explain
SHORTNESS = 1e-5  # added per squared pixel of displacement: of matches that are as good, the shortest

SIDE = 2 * REACH + 1


def optical_flow(video: Tensor) -> Tensor:
    """Where each cell of a frame is in the next frame (Jain and Jain 1981: full search, least squared difference).

    Every displacement up to `REACH` is tried on slightly softened frames, and refined below a pixel by a parabola
    through the neighbouring costs. A cell moves only if its displacement explains at least half of the difference that
    standing still leaves; so flat areas, noise, changes of brightness and content that is not found again have none.

    Args:
        video: (f, 3, H, W), range [-1, 1], at least two frames.

    Returns:
        (f - 1, 2, ceil(H / 4), ceil(W / 4)): x (right is positive) and y (down is positive) in pixels per frame, at
        most `REACH` each.
    """
    soft = F.avg_pool2d(video, 3, stride=1, padding=1, count_include_pad=False)  # parabolas fit soft edges only
    return torch.stack([_match(frame, following) for frame, following in zip(soft[:-1], soft[1:], strict=True)])


def warp_errors(video: Tensor, flow: Tensor) -> Tensor:
    """What is left of the change between neighbouring frames once the next frame is moved back along the flow.

    As in Lai et al. 2018 (arXiv 1808.00449, section 4.1), but absolute instead of squared, and with the mask of what
    stays in the picture instead of an occlusion mask, which would hide that something vanished.

    Args:
        video: (f, 3, H, W), range [-1, 1].
        flow: of `optical_flow`.

    Returns:
        (f - 1,): mean absolute difference over the pixels, on the scale of [-1, 1]; range 0 to 2, 0 where every pixel
        is found again.
    """
    height, width = video.shape[-2:]
    dense = flow.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)[..., :height, :width]
    x = torch.arange(width) + dense[:, 0]
    y = torch.arange(height)[:, None] + dense[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    warped = F.grid_sample(video[1:], grid, padding_mode="border", align_corners=False)
    stays = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    error = (video[:-1] - warped).abs().mean(dim=1) * stays
    return error.sum(dim=(1, 2)) / stays.sum(dim=(1, 2)).clamp(min=1)


def _match(frame: Tensor, following: Tensor) -> Tensor:
    """Flow (2, h, w) from one frame (3, H, W) to another."""
    cost = _cost(frame, following)
    steps = torch.arange(-REACH, REACH + 1)
    dy, dx = (axis.flatten() for axis in torch.meshgrid(steps, steps, indexing="ij"))
    best = (cost + SHORTNESS * (dy.square() + dx.square())[:, None, None]).argmin(dim=0, keepdim=True)
    y, x = dy[best], dx[best]
    more_y, gain_y = _refine(cost, best, SIDE, y.abs() < REACH)
    more_x, gain_x = _refine(cost, best, 1, x.abs() < REACH)
    left = (cost.gather(0, best) - gain_y - gain_x).clamp(min=0)
    moving = left < (1 - MIN_GAIN) * cost[SIDE * REACH + REACH]
    return torch.cat([x + more_x, y + more_y]) * moving


def _cost(frame: Tensor, following: Tensor) -> Tensor:
    """Mean squared difference of every block for every displacement, rows of y before x: (SIDE * SIDE, h, w)."""
    height, width = frame.shape[-2:]
    padded = F.pad(following[None], (REACH,) * 4, mode="replicate")[0]
    moved = padded.unfold(1, height, 1).unfold(2, width, 1)  # (3, SIDE, SIDE, H, W), a view
    difference = torch.zeros(SIDE, SIDE, height, width)
    for a, b in zip(frame, moved, strict=True):
        difference += (b - a).square()
    cells = F.avg_pool2d(difference.flatten(0, 1) / 3, CELL, ceil_mode=True)
    return F.avg_pool2d(cells, BLOCK, stride=1, padding=BLOCK // 2, count_include_pad=False)


def _refine(cost: Tensor, best: Tensor, step: int, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest point of the parabola through three costs: its distance from the middle one, at most 0.5, and depth."""
    before, here, after = (cost.gather(0, (best + move).clamp(0, len(cost) - 1)).double() for move in (-step, 0, step))
    curvature = (before - 2 * here + after).clamp(min=1e-9)
    more = ((before - after) / (2 * curvature)).clamp(-0.5, 0.5) * inside
    return more.float(), (more * (before - after) / 4).float()
