"""FreeU (arXiv 2309.11497): a stronger backbone and weaker skip connections in the coarsest blocks on the way up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from animatediff_kernels.cpu import laid_out_like
from torch import Tensor, nn

from animatediff.features.feature import FrameDenoise, Run
from animatediff.models.unet import UNet


@contextmanager
def freeu(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`freeu`: b1, b2, s1 and s2."""
    if (f := run.request.freeu) is None:
        yield denoise
        return
    with freeu_applied(run.model.unet, (f.b1, f.b2), (f.s1, f.s2)):
        yield denoise


@contextmanager
def freeu_applied(unet: UNet, b: tuple[float, float], s: tuple[float, float]) -> Iterator[None]:
    """The first two blocks on the way up, changed as the official code changes them (sec. 3.3).

    Args:
        b: factors of half the backbone's channels, where its mean is largest (Eq. 4 and 5); elsewhere nearer to 1.
        s: factors of the skip connections' lowest frequencies (Eq. 6 to 8).
    """
    widths = list(reversed(unet.config.block_out_channels))
    with ExitStack() as stack:
        for level, (block, strength, damping) in enumerate(zip(unet.up_blocks, b, s, strict=False)):
            for i, resnet in enumerate(block.resnets):
                backbone = widths[max(level - 1, 0)] if i == 0 else widths[level]
                hook = _freeu_hook(backbone, strength, damping)
                stack.callback(resnet.register_forward_pre_hook(hook).remove)
        yield


def _freeu_hook(backbone: int, b: float, s: float) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, skip = args[0].split([backbone, args[0].shape[1] - backbone], dim=1)
        scaled = torch.cat([scale_backbone(x, b), scale_skip_low_frequencies(skip, s)], dim=1)
        return (laid_out_like(scaled, args[0]), *args[1:])

    return hook


def scale_backbone(x: Tensor, b: float) -> Tensor:
    """The first half of the channels times 1 … b, after the channels' mean at each place (n, c, h, w)."""
    mean = x.mean(dim=1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    factor = 1 + (b - 1) * (mean - low) / (high - low).clamp(min=1e-6)
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * factor, x[:, half:]], dim=1)


def scale_skip_low_frequencies(x: Tensor, s: float) -> Tensor:
    """The frequencies -1 and 0 along both axes times s (n, c, h, w), as the paper's code takes them."""
    spectrum = torch.fft.fft2(x.float())
    rows, columns = torch.tensor([[-1], [0]]), torch.tensor([-1, 0])
    spectrum[..., rows, columns] *= s
    return torch.fft.ifft2(spectrum).real.to(x.dtype)
