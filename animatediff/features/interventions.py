"""What reaches into a UNet while a clip is sampled and leaves no trace: hooks and settings, taken back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.models.attention import Attention, SpatialTransformerBlock
from animatediff.models.motion import MotionModule, TemporalAttention
from animatediff.models.unet import UNet
from animatediff.utils import UserError


class MotionScale:
    """How much of what the motion modules do is done: x + scale * (module(x) - x).

    Attributes:
        values: (f,), of the frames that the network sees now; 0 is the image model, 1 the module as it is.
        mask: (h, w) in [0, 1], of any size: what the scale is multiplied with at every place.
    """

    def __init__(self, mask: Tensor | None = None):
        self.values: Tensor | None = None
        self.mask = mask

    def hook(self, module: nn.Module, args: tuple[Tensor, int], out: Tensor) -> Tensor:
        x, frames = args
        assert self.values is not None
        scale = self.values.to(out).repeat(len(x) // frames)[:, None, None, None]
        if self.mask is not None:
            scale = scale * F.interpolate(self.mask.to(out)[None, None], size=x.shape[-2:], mode="area")
        return x + scale * (out - x)


@contextmanager
def motion_scaled(unet: UNet, scale: MotionScale) -> Iterator[None]:
    with ExitStack() as stack:
        for module in unet.modules():
            if isinstance(module, MotionModule):
                stack.callback(module.register_forward_hook(scale.hook).remove)
        yield


@contextmanager
def positions_stretched(unet: UNet, stretch: float) -> Iterator[None]:
    """Count positions in steps of 1 / stretch, so that a clip `stretch` times as long spans the trained ones."""
    config, attentions = unet.config, [m for m in unet.modules() if isinstance(m, TemporalAttention)]
    if config.motion:
        longest = int(config.motion.max_frames * stretch)
        unet.config = config.with_motion(replace(config.motion, max_frames=longest))
    for attention in attentions:
        attention.stretch = stretch
    try:
        yield
    finally:
        unet.config = config
        for attention in attentions:
            attention.stretch = 1.0


@contextmanager
def attention_perturbed(unet: UNet, layers: Sequence[str], parts: int) -> Iterator[None]:
    """Give the last of `parts` equal parts of the batch an identity for its self-attention maps.

    Perturbed-attention guidance (arXiv 2403.17377, Eq. 13).

    Args:
        layers: beginnings of the names of blocks, such as "mid_block" or "up_blocks.1.attentions.0".

    Raises:
        UserError: no spatial self-attention is below one of the layers.
    """

    def hook(module: Attention, args: tuple[Tensor], out: Tensor) -> Tensor:
        kept = len(out) - len(out) // parts
        return torch.cat([out[:kept], module.identity(args[0][kept:])])

    with ExitStack() as stack:
        for attention in perturbed_attentions(unet, layers):
            stack.callback(attention.register_forward_hook(hook).remove)
        yield


def perturbed_attentions(unet: UNet, layers: Sequence[str]) -> list[Attention]:
    """The spatial self-attentions below these layers. Raises: UserError where there are none."""
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, SpatialTransformerBlock)}
    found: dict[str, Attention] = {}
    for layer in layers:
        below = {name: m.attn1 for name, m in blocks.items() if f"{name}.".startswith(f"{layer}.")}
        if not below:
            known = sorted({".".join(name.split(".")[: 1 + name.startswith(("down", "up"))]) for name in blocks})
            raise UserError(f"pag_layers: got {layer!r}, expected layers with attention, such as {', '.join(known)}")
        found |= below
    return list(found.values())


@contextmanager
def cross_frame_attention(unet: UNet) -> Iterator[None]:
    """Give the self-attention of all frames the keys and values of the first frame of their clip.

    Text2Video-Zero's cross-frame attention (arXiv 2303.13439): frames of other noise show the same things.
    """
    frames = 1

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal frames
        frames = args[0].shape[1]

    def look_at_first(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], args[0][::frames]  # a context of one row per clip

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(count).remove)
        for module in unet.modules():
            if isinstance(module, SpatialTransformerBlock):
                stack.callback(module.attn1.register_forward_pre_hook(look_at_first).remove)
        yield


@contextmanager
def freed(unet: UNet, b: tuple[float, float], s: tuple[float, float]) -> Iterator[None]:
    """FreeU (arXiv 2309.11497, sec. 3.3) in the first two blocks on the way up, those of the coarsest features.

    Args:
        b: factors of half the backbone's channels, where its mean is largest (Eq. 4 and 5); elsewhere nearer to 1.
        s: factors of the skip connections' lowest frequencies (Eq. 6 to 8).
    """
    widths = list(reversed(unet.config.block_out_channels))
    with ExitStack() as stack:
        for level, (block, strength, damping) in enumerate(zip(unet.up_blocks, b, s, strict=False)):
            for i, resnet in enumerate(block.resnets):
                backbone = widths[max(level - 1, 0)] if i == 0 else widths[level]
                hook = _free_hook(backbone, strength, damping)
                stack.callback(resnet.register_forward_pre_hook(hook).remove)
        yield


def _free_hook(backbone: int, strength: float, damping: float):
    def hook(module: nn.Module, args: tuple) -> tuple:
        x, skip = args[0].split([backbone, args[0].shape[1] - backbone], dim=1)
        return (torch.cat([strengthen(x, strength), damp_low_frequencies(skip, damping)], dim=1), *args[1:])

    return hook


def strengthen(x: Tensor, b: float) -> Tensor:
    """The first half of the channels times 1 … b, after the channels' mean at each place (n, c, h, w)."""
    mean = x.mean(dim=1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    factor = 1 + (b - 1) * (mean - low) / (high - low).clamp(min=1e-6)
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * factor, x[:, half:]], dim=1)


def damp_low_frequencies(x: Tensor, s: float) -> Tensor:
    """The frequencies -1 and 0 along both axes times s (n, c, h, w), as the paper's code takes them."""
    spectrum = torch.fft.fft2(x.float())
    rows, columns = torch.tensor([[-1], [0]]), torch.tensor([-1, 0])
    spectrum[..., rows, columns] *= s
    return torch.fft.ifft2(spectrum).real.to(x.dtype)
