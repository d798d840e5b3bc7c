"""FreeInit (arXiv 2312.07537): sample, keep the slow and coarse part of what came out, and sample again.

The start noise of a clip has no low frequencies in common between its frames; diffused training clips have some, what
is left of the clip. So the low frequencies of the next start are those of the last result, diffused with
the first noise; the high ones are fresh noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from animatediff.config.request import FreeInit
from animatediff.diffusion.schedule import NoiseSchedule

Sample = Callable[[Tensor, int], Tensor]  # start latents, iteration -> clean latents


def free_init(
    sample: Sample, start: Tensor, settings: FreeInit, *, schedule: NoiseSchedule, noise: Callable[[], Tensor]
) -> Tensor:
    """Sample `settings.iterations` times, each from a start that the one before has improved (Alg. 1).

    Args:
        sample: any sampler, from start latents to clean ones.
        start: standard normal latents (b, f, c, h, w) of the first iteration; they diffuse the results of all.
        schedule: says what is left of a clip at its last timestep.
        noise: draws fresh standard normal latents of the same shape.

    Returns:
        The clean latents of the last iteration.
    """
    frames, (h, w) = start.shape[1], start.shape[-2:]
    keep = low_pass((frames, h, w), settings).to(start.device)
    x = sample(start, 0)
    last = torch.full((len(x),), len(schedule.alphas_cumprod) - 1)
    for iteration in range(1, settings.iterations):
        diffused = schedule.add_noise(x, start, last)
        x = sample(mix_frequencies(diffused, noise().to(x), keep), iteration)
    return x


def mix_frequencies(low: Tensor, high: Tensor, keep: Tensor) -> Tensor:
    """The low frequencies of one video and the high ones of another, in float32.

    Args:
        low, high: (b, f, c, h, w).
        keep: from `low_pass`, (f, h, w).
    """
    axes = (1, 3, 4)
    # one transform: F(low) keep + F(high) (1 - keep) = F(high) + F(low - high) keep
    change = torch.fft.fftn((low - high).float(), dim=axes) * keep[:, None]
    return high.float() + torch.fft.ifftn(change, dim=axes).real


def low_pass(size: tuple[int, int, int], settings: FreeInit) -> Tensor:
    """How much of each frequency to keep, float32 (f, h, w) in [0, 1], in the order of torch.fft (0 first).

    d² = (stop_s / stop_t · t)² + y² + x², where t, y and x are -1 … 1 of the highest frequency. The ideal filter is a
    ball of radius stop_s; other implementations keep d² <= 2 stop_s, a ball of more than twice the radius.
    """
    spatial, temporal = settings.spatial_stop, settings.temporal_stop
    if not spatial or not temporal:
        return torch.zeros(size)
    index = [torch.fft.ifftshift(torch.arange(n) - n // 2).double() for n in size]  # 0, 1 … -2, -1
    if settings.filter == "box":
        edges = (round(size[0] // 2 * temporal), *(round(n // 2 * spatial) for n in size[1:]))
        t, y, x = ((i >= -edge) & (i < edge) for i, edge in zip(index, edges, strict=True))
        return (t[:, None, None] & y[:, None] & x).float()
    t, y, x = (2 * i / n for i, n in zip(index, size, strict=True))
    squared = (spatial / temporal * t)[:, None, None] ** 2 + y[:, None] ** 2 + x**2
    if settings.filter == "butterworth":
        return (1 / (1 + (squared / spatial**2) ** settings.order)).float()
    if settings.filter == "gaussian":
        return (-squared / (2 * spatial**2)).exp().float()
    return (squared <= spatial**2).float()
