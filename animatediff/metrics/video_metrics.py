"""Does a clip move, how evenly, does it flicker, does it loop, are seeds different: numbers of any video.

No network is needed. Clips are given as frames (f, 3, H, W): floats in [-1, 1], or uint8. `change`, `jump` and `seam`
are measured on the frames as they are; flow, warp error, spectrum and diversity on frames that are shrunk to at most
`FLOW_SIZE` pixels (speeds are given in pixels of the clip itself).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.metrics.block_matching import optical_flow, warp_errors
from animatediff.utils import UserError

FLOW_SIZE = 128  # pixels of the longer side of the frames that flow is measured on
FLICKER_CELLS = 8  # rows and columns of the grid whose brightness flickers
FASTEST = 0.05  # share of a frame that `top_speed` is measured on


@dataclass(frozen=True)
class VideoMetrics:
    """What was measured on one clip. None where the clip is too short or too still for the question.

    frames: how many.
    change: mean absolute difference between neighbouring frames, over pixels and channels, on the scale of [-1, 1];
        range 0 to 2. 0: a still image.
    jump: the largest difference between neighbouring frames over their mean `change`; range 1 to frames - 1. 1: every
        step changes as much; frames - 1: a single cut, else still.
    speed: mean length of the optical flow over pixels and frames; pixels of the clip per frame, at least 0. Faster than
        12 pixels of the shrunk frame, in x or y, is not seen.
    top_speed: the same over the fastest 5 % of each frame, so that a small moving thing counts (the *dynamic degree*
        of VBench, Huang et al. 2023, arXiv 2311.17982, with another flow).
    direction: of the mean flow vector; degrees in (-180, 180], 0 right, 90 up.
    coherence: length of the mean flow vector over the mean length; range 0 (all directions, as in a spin or to and
        fro) to 1 (one direction).
    evenness: 1 - |v' - v| / (|v'| + |v|) for the flow fields v, v' of neighbouring steps, each norm the sum over
        pixels and steps; range 0 (each step unlike the one before) to 1 (steady motion).
    flicker: mean absolute second difference in time of the brightness of an 8 x 8 grid of cells, over 4, on the scale
        of [-1, 1]: the amplitude of a brightness that alternates from frame to frame. Range 0 to 1; 0 for a steady
        fade.
    high_frequency: share of `temporal_spectrum` above a quarter cycle per frame; range 0 (slow changes) to 1
        (alternating frames). White noise has about 0.5.
    peak_frequency: where `temporal_spectrum` is largest; cycles per frame, range 1 / frames to 0.5.
    warp_error: mean of `warp_errors`: what motion does not explain (noise, flicker, things that melt or vanish);
        range 0 to 2.
    seam: `loop_seam`; 1 and less: loops without a visible seam.
    """

    frames: int
    change: float | None
    jump: float | None
    speed: float | None
    top_speed: float | None
    direction: float | None
    coherence: float | None
    evenness: float | None
    flicker: float | None
    high_frequency: float | None
    peak_frequency: float | None
    warp_error: float | None
    seam: float | None


@torch.no_grad()
def measure_video(video: Tensor) -> VideoMetrics:
    """Measure one clip.

    Args:
        video: (f, 3, H, W), floats in [-1, 1] or uint8; any size, from one frame on.

    Raises:
        UserError: another shape or dtype, no frame, values that are not finite or out of range.
    """
    video = _checked(video)
    small = shrink(video)
    changes = _changes(video)
    change = float(changes.mean()) if len(changes) else None
    spectrum = temporal_spectrum(small)
    peak = None if spectrum is None else int(spectrum[1:].argmax()) + 1
    flow = optical_flow(small) if len(video) > 1 else None
    return VideoMetrics(
        frames=len(video),
        change=change,
        jump=float(changes.max()) / change if change else None,
        **_describe_flow(flow, scale=max(video.shape[-2:]) / max(small.shape[-2:])),
        flicker=flicker(small),
        high_frequency=None if spectrum is None else float(spectrum[len(video) // 4 + 1 :].sum()),
        peak_frequency=None if peak is None else peak / len(video),
        warp_error=None if flow is None else float(warp_errors(small, flow).mean()),
        seam=loop_seam(video),
    )


@torch.no_grad()
def loop_seam(video: Tensor) -> float | None:
    """Change from the last frame to the first, over the mean change between neighbouring frames.

    Args:
        video: (f, 3, H, W), floats in [-1, 1] or uint8.

    Returns:
        At least 0. About 1: the clip goes on into its beginning as evenly as it runs; 0: it ends with its first frame;
        f - 1 for a steady fade. None for a still or a single frame.
    """
    video = _checked(video)
    changes = _changes(video)
    if not changes.any():
        return None
    return _difference(video[-1], video[0]) / float(changes.mean())


@torch.no_grad()
def flicker(video: Tensor) -> float | None:
    """`VideoMetrics.flicker` of a clip (f, 3, H, W), floats in [-1, 1] or uint8; None below three frames.

    Brightness is the mean of the channels. Cells are large, so that a texture that moves does not count.
    """
    frames = _checked(video)
    if len(frames) < 3:
        return None
    cells = torch.stack([F.adaptive_avg_pool2d(_signed(frame).mean(dim=0)[None], FLICKER_CELLS) for frame in frames])
    return float(cells.diff(n=2, dim=0).abs().mean() / 4)


@torch.no_grad()
def temporal_spectrum(video: Tensor) -> Tensor | None:
    """How the changes of the pixels are shared out among frequencies.

    The power spectrum of every pixel and channel in time, its mean taken off, under a Hann window (Welch 1967), summed
    over the pixels.

    Args:
        video: (f, 3, H, W), floats in [-1, 1] or uint8.

    Returns:
        (f // 2 + 1,): shares with the sum 1; entry k has k / f cycles per frame, entry 0 is 0. None for a still or a
        single frame.
    """
    values = _signed(_checked(video)).flatten(1)
    values = values - values.mean(dim=0)
    if len(values) < 2 or not (values.abs() > 1e-6).any():
        return None
    window = torch.hann_window(len(values) + 2, periodic=False)[1:-1, None]
    power = torch.fft.rfft(values * window, dim=0).abs().square().sum(dim=1)
    power[0] = 0
    power[1 : (len(values) + 1) // 2] *= 2  # they stand for the negative frequencies too
    return power / power.sum()


@torch.no_grad()
def diversity(videos: Sequence[Tensor]) -> float:
    """Mean absolute difference between clips of one prompt and different seeds, over all pairs, pixels and frames.

    Args:
        videos: at least two clips (f, 3, H, W) of one shape, floats in [-1, 1] or uint8; they are shrunk as for flow,
            so that fine noise does not count.

    Returns:
        On the scale of [-1, 1], range 0 to 2. 0: the seed makes no difference.

    Raises:
        UserError: a single clip, or clips of different shapes.
    """
    shapes = {tuple(video.shape) for video in videos}
    if len(videos) < 2 or len(shapes) > 1:
        raise UserError(f"got {len(videos)} clips of shapes {sorted(shapes)}, expected at least two of one shape")
    ranked = torch.stack([shrink(_checked(video)) for video in videos]).sort(dim=0).values
    count = len(ranked)
    ranks = 2.0 * torch.arange(count) - (count - 1)  # over all pairs, the sum of |a - b| is that of rank * value
    return float(ranks @ ranked.flatten(1).mean(dim=1)) * 2 / (count * (count - 1))


def shrink(video: Tensor) -> Tensor:
    """Frames (f, 3, H, W), floats in [-1, 1] or uint8, as floats of at most `FLOW_SIZE` pixels, by averaging."""
    longest = max(video.shape[-2:])
    if longest <= FLOW_SIZE:
        return _signed(video)
    size = [max(round(side * FLOW_SIZE / longest), 1) for side in video.shape[-2:]]
    return torch.cat([F.interpolate(_signed(frame)[None], size=size, mode="area") for frame in video])


def _describe_flow(flow: Tensor | None, *, scale: float) -> dict[str, float | None]:
    """Speeds, direction, coherence and evenness of flow (f - 1, 2, h, w); `scale` clip pixels to one of its pixels."""
    if flow is None:
        return dict.fromkeys(("speed", "top_speed", "direction", "coherence", "evenness"))
    lengths = flow.norm(dim=1).flatten(1)
    speed = float(lengths.mean())
    fastest = lengths.topk(max(round(FASTEST * lengths.shape[1]), 1)).values
    x, y = flow.mean(dim=(0, 2, 3)).tolist()
    total = float(lengths[1:].sum() + lengths[:-1].sum())
    unlike = float(flow.diff(dim=0).norm(dim=1).sum())
    return {
        "speed": speed * scale,
        "top_speed": float(fastest.mean()) * scale,
        "direction": math.degrees(math.atan2(0.0 - y, x)) if speed else None,
        "coherence": min(math.hypot(x, y) / speed, 1.0) if speed else None,
        "evenness": max(1 - unlike / total, 0.0) if total else None,
    }


def _changes(video: Tensor) -> Tensor:
    """(f - 1,): mean absolute difference between neighbouring frames, on the scale of [-1, 1]."""
    return torch.tensor([_difference(a, b) for a, b in zip(video[:-1], video[1:], strict=True)])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((_signed(a) - _signed(b)).abs().mean())


def _signed(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; floats to float32."""
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.float()


def _checked(video: Tensor) -> Tensor:
    if video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise UserError(f"got a clip of shape {tuple(video.shape)}, expected (f, 3, H, W) with at least one frame")
    if video.dtype == torch.uint8:
        return video.detach().cpu()
    if not video.is_floating_point():
        raise UserError(f"got a clip of {video.dtype}, expected floats in [-1, 1] or uint8")
    if not bool(video.isfinite().all()):
        raise UserError("got a clip with values that are not finite, expected [-1, 1]: try float32")
    if (largest := float(video.abs().max())) > 1.001:
        raise UserError(f"got a clip with values up to {largest:g}, expected floats in [-1, 1]: scale or clamp them")
    return video.detach().cpu()
