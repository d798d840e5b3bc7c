"""Extending a video: a chain of windows, each of which begins with frames that are known already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from animatediff.features.known_frames import KnownFrames, interpolate_ends
from animatediff.features.windows import DEFAULT_LENGTH


def chain_window(max_frames: int | None) -> int:
    """Frames of a chain's windows: what motion modules are trained on, or as many as this one takes."""
    return min(DEFAULT_LENGTH, max_frames or DEFAULT_LENGTH)


def extension_windows(known: int, frames: int, *, window: int, overlap: int) -> list[tuple[int, int]]:
    """The windows of frames (first, end) that take a clip from `known` frames to `frames`, one after the other.

    Each has `window` frames, if there are as many, and begins with `overlap` known ones or more.
    """
    found = []
    while known < frames:
        known = min(max(known - overlap, 0) + window, frames)
        found.append((max(known - window, 0), known))
    return found


def extend_video(
    sample: Callable[[Tensor, KnownFrames, int], Tensor],
    known: Tensor,
    noise: Tensor,
    *,
    window: int,
    overlap: int,
    ramp: float,
) -> Tensor:
    """A clip that begins with `known` (b, k, c, h, w), which stays.

    Args:
        sample: (noise, known frames, number of the first frame) -> clean latents of a window.
        noise: (b, f, c, h, w), of the whole clip.
        window, overlap: frames of a window, and those of them, at least, that are known.
        ramp: as for `interpolate_ends`.
    """
    for first, end in extension_windows(known.shape[1], noise.shape[1], window=window, overlap=overlap):
        start = interpolate_ends(known[:, first:], None, end - first, ramp=ramp)
        known = torch.cat([known[:, :first], sample(noise[:, first:end], start, first)], dim=1)
    return known
