"""Clips longer than the network was trained for: overlapping windows of frames, whose predictions are fused.

Every step starts its windows at another phase (except `static`), so that their borders never stay in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from animatediff.config.request import Windows
from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.schedule import step_of
from animatediff.features.feature import FrameDenoise, Spread, in_turn

DEFAULT_LENGTH = 16  # frames: what all motion modules were trained on

Window = tuple[int, ...]  # frame numbers, in the order in which the network sees them


def window_length(windows: Windows) -> int:
    return windows.length or DEFAULT_LENGTH


def window_overlap(windows: Windows) -> int:
    return window_length(windows) // 4 if windows.overlap is None else windows.overlap


def windows_of_step(windows: Windows, step: int, frames: int) -> list[Window]:
    """The windows of a step (from 0) of a clip; together they hold every frame, each one no frame twice."""
    return SCHEDULES[windows.schedule](windows, step, frames)


def window_weights(windows: Windows, window: Window, frames: int) -> Tensor:
    """How much each frame of a window counts, float32 (len(window),), all above 0."""
    first, last = (not windows.loops and frame in window for frame in (0, frames - 1))
    overlap = min(window_overlap(windows), len(window) - 1)
    return FUSIONS[windows.fuse](len(window), overlap, not first, not last)


def full_clip(denoise: FrameDenoise, first: int = 0) -> Denoise:
    """A denoiser of whole clips, all of whose frames go through the network together; `first` is the first's number."""
    return lambda x, t: denoise(x, t, torch.arange(first, first + x.shape[1]))


def sliding_windows(denoise: FrameDenoise, windows: Windows, timesteps: Tensor, *, spread: Spread = in_turn) -> Denoise:
    """A denoiser of whole clips from one of windows; only one window at a time goes through the network.

    Every frame's prediction is the mean of those its windows make, weighted by its place in them. It goes around a
    denoiser without guidance, so that conditional and unconditional predictions are averaged apart.

    Args:
        denoise: of w frames at a time, told which they are.
        timesteps: (steps,), those of the sampler: they tell which step it is.
        spread: computes the windows of a step.

    Returns:
        A denoiser of x (b, f, c, h, w), any f, and t (b,).
    """

    def denoise_clip(x: Tensor, t: Tensor) -> Tensor:
        step = step_of(timesteps, t)
        out, total = torch.zeros_like(x), x.new_zeros(x.shape[1], 1, 1, 1)
        every = windows_of_step(windows, step, x.shape[1])

        def predict(window: Window) -> Tensor:
            return denoise(x[:, list(window)], t, torch.tensor(window))

        predictions = spread([partial(predict, window) for window in every], x[:, list(every[0])])
        for window, prediction in zip(every, predictions, strict=True):
            index = torch.tensor(window, device=x.device)
            weight = window_weights(windows, window, x.shape[1]).to(x).reshape(-1, 1, 1, 1)
            out.index_add_(1, index, weight * prediction)
            total.index_add_(0, index, weight)
        return out / total

    return denoise_clip


# ---- schedules: (windows, step, frames) -> the windows of a step ------------------------------------------------


def van_der_corput(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8 …: van der Corput's sequence in base 2, within [0, 1)."""
    return int(f"{step:b}"[::-1], 2) / 2 ** max(step.bit_length(), 1)


def _runs(starts: list[int], length: int, frames: int, *, stride: int = 1) -> list[Window]:
    """Windows from these first frames on; past the last frame comes the first."""
    length = min(length, frames)
    return [tuple((start + i * stride) % frames for i in range(length)) for start in starts]


def _open(w: Windows, step: int, frames: int) -> list[Window]:
    """At places `length - overlap` apart, shifted by a phase and pushed inside the clip, and at its two ends."""
    apart, last = window_length(w) - window_overlap(w), max(frames - window_length(w), 0)
    phase = round(apart * van_der_corput(step))
    shifted = range(-phase, frames - window_overlap(w), apart)
    return _runs(sorted({0, last, *(min(max(start, 0), last) for start in shifted)}), window_length(w), frames)


def _static(w: Windows, step: int, frames: int) -> list[Window]:
    """The open schedule's first step, at every step."""
    return _open(w, 0, frames)


def _closed(w: Windows, step: int, frames: int) -> list[Window]:
    """At least two windows, evenly around the loop, turned by a part of the way from one to the next."""
    count = max(2, math.ceil(frames / (window_length(w) - window_overlap(w))))
    phase = round(frames / count * van_der_corput(step))
    starts = {(round(i * frames / count) + phase) % frames for i in range(count)}
    return _runs(sorted(starts), window_length(w), frames)


def _uniform(w: Windows, step: int, frames: int) -> list[Window]:
    """The `uniform` of other implementations with its loop closed, less its windows that hold a frame twice.

    Its phase is a part of the whole clip: where windows divide the clip evenly, a turn can bring them back in place.
    """
    if frames <= window_length(w):
        return _runs([0], window_length(w), frames)
    phase, found = van_der_corput(step), []
    turn = round(frames * phase)
    for level in range(min(w.stride, math.ceil(math.log2(frames / window_length(w))) + 1)):
        stride = 2**level
        starts = range(int(phase * stride) + turn, frames + turn, window_length(w) * stride - window_overlap(w))
        found += _runs(list(starts), window_length(w), frames, stride=stride)
    return [window for window in found if len(set(window)) == len(window)]


SCHEDULES: dict[str, Callable[[Windows, int, int], list[Window]]] = {
    "open": _open,
    "closed": _closed,
    "static": _static,
    "uniform": _uniform,
}

# ---- fusions: (length, overlap, has a window before, has one after) -> weights (length,) --------------------------


def _flat(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    return torch.ones(length)


def _pyramid(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    """1, 2 … in the middle … 2, 1."""
    rising = torch.arange(1, length + 1)
    return torch.minimum(rising, rising.flip(0)).float()


def _overlap_linear(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    """1, with a ramp over the overlap at each side that has a neighbour; two ramps that meet add up to 1."""
    ramp = torch.arange(1, length + 1) / (overlap + 1)
    weights = torch.ones(length)
    if before:
        weights = torch.minimum(weights, ramp)
    if after:
        weights = torch.minimum(weights, ramp.flip(0))
    return weights


def _gaussian(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    """A bell of standard deviation length / 6."""
    place = torch.arange(length) - (length - 1) / 2
    return (-0.5 * (place / (length / 6)) ** 2).exp()


FUSIONS: dict[str, Callable[[int, int, bool, bool], Tensor]] = {
    "flat": _flat,
    "pyramid": _pyramid,
    "overlap-linear": _overlap_linear,
    "gaussian": _gaussian,
}
