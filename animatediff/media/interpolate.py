"""Frames between frames, by motion that is found in the clip itself (or what else is given: a learned model).

A frame between two others is estimated where it is: each of its pixels is given the displacement along which the frame
before and the frame after agree best (bilateral motion estimation, Choi et al. 2007, "Motion-compensated frame
interpolation using bilateral motion estimation and adaptive overlapped block motion compensation"), from coarse to
fine. docs/finishing.md has what it was measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.utils import UserError

FACTORS = (1, 2, 4, 8)
COARSEST = 8  # pixels: the shorter side of the smallest picture that motion is looked for in is at least that
STEPS = (1.0, 1.0)  # pixels of the search at every scale: each pixel may move by one of these in x and y, in turn
FIRST_STEP, LAST_STEP = 2.0, 0.5  # before them at the coarsest scale, after them at the finest
PATCH = 5  # pixels, both sides, that are compared together
UNEVEN = 0.01  # cost of leaving the coarser scale's motion by a pixel, on the scale of [-1, 1]
LONG = 0.16  # cost of a displacement as long as the frame: of matches that are as good, the shortest
CUT = 0.25  # mean difference, on the scale of [-1, 1], that motion leaves between frames of different scenes
AT_ONCE = 2**18  # pixels of frames that are made together

Between = Callable[[Tensor, Tensor, Tensor], Tensor]  # frames (n, 3, H, W) in [-1, 1], times (n,) -> frames


@torch.no_grad()
def interpolate(
    video: Tensor,
    factor: int,
    *,
    loop: bool = False,
    between: Between | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A clip with `factor` times as many frames per second; its own frames stay as they are.

    Args:
        video: uint8 (f, 3, H, W), at least two frames.
        factor: one of FACTORS.
        loop: also make frames between the last and the first.
        between: by default `between_by_motion`.

    Returns:
        uint8: ((f - 1) factor + 1, 3, H, W), of a loop (f factor, 3, H, W); entry i factor is frame i.

    Raises:
        UserError: another factor, or a single frame.
    """
    if factor not in FACTORS:
        raise UserError(f"got interpolation by {factor}, expected one of {', '.join(map(str, FACTORS))}")
    if factor == 1:
        return video
    if len(video) < 2:
        raise UserError(
            "got a single frame, expected at least two to find frames between them: leave interpolation out"
        )
    pairs = max(AT_ONCE // (video[0, 0].numel() * (factor - 1)), 1)
    following = (video.roll(-1, dims=0) if loop else video[1:]).split(pairs)
    frames: list[Tensor] = []
    for first, last in zip(video[: None if loop else -1].split(pairs), following, strict=True):
        times = torch.arange(1, factor, device=device).repeat(len(first)) / factor
        a, b = (x.to(device).float().div(127.5).sub(1).repeat_interleave(factor - 1, dim=0) for x in (first, last))
        made = ((between or between_by_motion)(a, b, times) + 1) * 127.5
        made = made.round().clamp(0, 255).to(torch.uint8).to(video.device).unflatten(0, (len(first), factor - 1))
        frames.append(torch.cat([first[:, None], made], dim=1).flatten(0, 1))
    return torch.cat(frames if loop else [*frames, video[-1:]])


def between_by_motion(first: Tensor, last: Tensor, times: Tensor) -> Tensor:
    """The frames at `times`, between 0 and 1, by motion; where a cut lies between the two, the nearer one.

    Args:
        first, last: (n, 3, H, W) in [-1, 1].
        times: (n,).
    """
    t = times.reshape(-1, 1, 1, 1)
    flow = motion_at(first, last, t)
    a, b = moved(first, -t * flow, "bicubic"), moved(last, (1 - t) * flow, "bicubic")
    cut = (a - b).abs().mean(dim=(1, 2, 3), keepdim=True) > CUT
    return torch.where(cut, torch.where(t < 0.5, first, last), torch.lerp(a, b, t)).clamp(-1, 1)


def motion_at(first: Tensor, last: Tensor, t: Tensor) -> Tensor:
    """Where the pixels of the frames at times t go: displacements (n, 2, H, W) in pixels from `first` to `last`.

    x (right is positive) before y (down is positive): frame(p) is first(p - t d) and last(p + (1 - t) d).

    Args:
        first, last: (n, 3, H, W) in [-1, 1].
        t: (n, 1, 1, 1).
    """
    scales = [(first, last)]
    while min(scales[-1][0].shape[-2:]) >= 2 * COARSEST:
        scales.append(tuple(F.avg_pool2d(frame, 2, ceil_mode=True) for frame in scales[-1]))  # type: ignore[arg-type]
    flow = first.new_zeros(len(first), 2, *scales[-1][0].shape[-2:])
    for scale, (a, b) in reversed(list(enumerate(scales))):
        if flow.shape[-2:] != a.shape[-2:]:
            flow = 2 * F.interpolate(flow, size=a.shape[-2:], mode="bilinear", align_corners=False)
        steps = (FIRST_STEP,) * (scale == len(scales) - 1) + STEPS + (LAST_STEP,) * (scale == 0)
        for step in steps:
            flow = _median(_improved(flow, a, b, t, step))
    return flow


def _improved(flow: Tensor, a: Tensor, b: Tensor, t: Tensor, step: float) -> Tensor:
    """The flow, or for each pixel one of its eight neighbours at `step` pixels, whichever explains its patch best."""
    least = best = None
    for dx, dy in product((0.0, -step, step), repeat=2):
        tried = flow + flow.new_tensor([dx, dy]).reshape(1, 2, 1, 1)
        unlike = (moved(a, -t * tried) - moved(b, (1 - t) * tried)).abs().mean(dim=1, keepdim=True)
        cost = F.avg_pool2d(F.pad(unlike, (PATCH // 2,) * 4, mode="replicate"), PATCH, stride=1)
        cost = cost + UNEVEN * (dx**2 + dy**2) ** 0.5 + LONG / max(a.shape[-2:]) * tried.norm(dim=1, keepdim=True)
        if least is None or best is None:
            least, best = cost, tried
        else:
            best = torch.where(cost < least, tried, best)
            least = torch.minimum(cost, least)
    assert best is not None
    return best


def moved(frames: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Frames (n, 3, H, W) looked up at their pixels plus `flow` (n, 2, H, W); beyond the border is the border."""
    height, width = frames.shape[-2:]
    x = torch.arange(width, device=frames.device) + flow[:, 0]
    y = torch.arange(height, device=frames.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(frames, grid, mode=mode, padding_mode="border", align_corners=False)


def _median(flow: Tensor) -> Tensor:
    """The median of every pixel's 3 x 3 neighbours, of x and y apart."""
    n, _, height, width = flow.shape
    neighbours = F.unfold(F.pad(flow, (1,) * 4, mode="replicate").reshape(n * 2, 1, height + 2, width + 2), 3)
    return neighbours.median(dim=1).values.reshape(flow.shape)
