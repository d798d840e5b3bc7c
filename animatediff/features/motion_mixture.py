"""Several motion modules in one network, each with a scale and its part of the steps (AnimateDiff-Evolved's "Gen2")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from animatediff.checkpoints.load import ImageModel, load_motion_module
from animatediff.config.keyframes import Keyframes
from animatediff.config.request import Request
from animatediff.diffusion.schedule import step_of
from animatediff.features.controlnet import active
from animatediff.features.feature import FrameDenoise, Run
from animatediff.models.motion import MotionModule
from animatediff.models.unet import UNet
from animatediff.utils import UserError

MID = "mid_block.motion_modules.0"


@contextmanager
def motion_mixture(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`extra_motion_modules`: they run before the motion module of the model, the last one of the list first."""
    options, network = run.request.mixture.modules, run.model.networks.get("mixture")
    if not options:
        yield denoise
        return
    sets = list(network)

    def mixed(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        step, progress = step_of(run.timesteps, t), run.progress(t)
        for motion, option in zip(sets, options, strict=True):
            scale, acts = Keyframes.read(option.scale), active(option.start, option.end, step, len(run.timesteps))
            motion.scale = torch.tensor([acts * scale.at(frame, progress) for frame in frames.tolist()])
        return denoise(x, t, frames, **inputs)

    with motion_sets_added(run.model.unet, sets[::-1]):
        yield mixed


class MotionSet(nn.Module):
    """The motion modules of one file, by their places in the UNet, and how much of what they do is done now.

    Attributes:
        scale: (f,), of the frames that the network sees; x + scale * (module(x) - x).
        max_frames: the longest clip they were trained on.
    """

    def __init__(self, unet: UNet):
        super().__init__()
        found = {name: m for name, m in unet.named_modules() if isinstance(m, MotionModule)}
        assert unet.config.motion is not None
        self.places, self.motion_modules = tuple(found), nn.ModuleList(found.values())
        self.max_frames = unet.config.motion.max_frames
        self.scale = torch.ones(1)

    def at(self, place: str, x: Tensor, frames: int) -> Tensor:
        """x ((b f), c, h, w) after the module of a place, if there is one."""
        if place not in self.places or not self.scale.any():
            return x
        out = self.motion_modules[self.places.index(place)](x, frames)
        return x + self.scale.to(x).repeat(len(x) // frames)[:, None, None, None] * (out - x)


@contextmanager
def motion_sets_added(unet: UNet, sets: Sequence[MotionSet]) -> Iterator[None]:
    """Let sets of motion modules act in their order, each before the UNet's own module of the same place."""
    frames = 1

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal frames
        frames = args[0].shape[1]

    def chain(place: str, x: Tensor) -> Tensor:
        for motion in sets:
            x = motion.at(place, x, frames)
        return x

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(count).remove)
        for name, module in unet.named_modules():
            if isinstance(module, MotionModule):

                def before(module: nn.Module, args: tuple, place: str = name) -> tuple:
                    return (chain(place, args[0]), *args[1:])

                stack.callback(module.register_forward_pre_hook(before).remove)
        if unet.mid_block.motion_modules is None:  # v2 has one there, v1 and v3 have none
            attention = unet.mid_block.attentions[0]
            stack.callback(attention.register_forward_hook(lambda module, args, out: chain(MID, out)).remove)
        yield


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[nn.ModuleList, str] | None:
    """The further motion modules of a request, and a line about them; None where there are none.

    Raises:
        UserError: one does not fit the image model, or was not trained on as many frames as the network sees.
    """
    sets, lines = nn.ModuleList(), []
    seen = request.windows.length if request.windows else request.size.num_frames
    for i, option in enumerate(request.mixture.modules):
        path = headers.paths[f"mixture.modules[{i}].path"]
        video, report = load_motion_module(image.unet, path, version=option.version or None)
        sets.append(MotionSet(video))
        lines.append(str(report))
        if (longest := sets[-1].max_frames) < seen:
            raise UserError(
                f"extra_motion_modules: got {seen} frames at a time, expected at most {longest}, the longest clip "
                f"{path} was trained on: set windows=open and window_length={longest}"
            )
    return (sets, "\n".join(lines)) if sets else None
