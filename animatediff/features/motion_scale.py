"""Motion scale, mask and stretched positions: how much the motion modules do, where, and at which speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.checkpoints.known_files import find_file
from animatediff.config.keyframes import Keyframes
from animatediff.features.feature import FrameDenoise, Run
from animatediff.media.pictures import read_mask
from animatediff.models.motion import MotionModule, TemporalAttention
from animatediff.models.unet import UNet


@contextmanager
def motion(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`motion.scale`, `motion.mask` and `motion.stretch`."""
    options, size, unet = run.request.motion, run.request.size, run.model.unet
    with ExitStack() as stack:
        if options.stretch != 1:
            stack.enter_context(positions_stretched(unet, options.stretch))
        if options.scale is None and not options.mask:
            yield denoise
            return
        path = find_file(options.mask) or options.mask if options.mask else None
        mask = run.once("motion.mask", lambda: path and read_mask(path, height=size.height, width=size.width))
        scale, hook = Keyframes.read(1.0 if options.scale is None else options.scale), MotionScale(mask)
        stack.enter_context(motion_scaled(unet, hook))

        def scaled(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
            hook.values = torch.tensor([scale.at(frame, run.progress(t)) for frame in frames.tolist()])
            return denoise(x, t, frames, **inputs)

        yield scaled


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
