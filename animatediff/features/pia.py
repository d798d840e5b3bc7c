"""PIA (arXiv 2312.13964): a motion module that animates a given picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from animatediff.checkpoints.load import ImageModel
from animatediff.checkpoints.motion_condition_files import load_motion_condition
from animatediff.config.request import Request
from animatediff.features.feature import FrameDenoise, Run
from animatediff.features.guide_pictures import picture_latents
from animatediff.models.pia_network import pia_affinity
from animatediff.models.unet import UNet


@contextmanager
def pia(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`pia`: a picture, and how far the frames may go from it."""
    options = run.request.pia
    if options.image is None:
        yield denoise
        return

    def make() -> Tensor:
        affinity = pia_affinity(
            options.motion, run.request.size.num_frames, picture_frame=options.frame, loop=options.loop,
            style_transfer=options.style_transfer,
        )  # fmt: skip
        return run.model.networks["pia"](picture_latents(options.image, run), torch.tensor(affinity))

    residual = run.once("pia", make)

    def animated(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        rows = residual[frames.to(residual.device)].repeat(len(x), 1, 1, 1)
        return denoise(x, t, frames, input_residual=rows, **inputs)

    yield animated


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[nn.Module, str] | None:
    """The network for PIA's picture, and a line about it; None where the motion module is another one."""
    return load_condition("pia", headers, image)


def load_condition(kind: str, headers: Any, image: ImageModel) -> tuple[nn.Module, str] | None:
    """The network for a picture in a motion module's file, where the file is of this kind."""
    if headers.motion is None or headers.motion.kind != kind:
        return None
    loaded = load_motion_condition(headers.paths["model.motion_module"], image.unet)
    assert loaded is not None
    return loaded[0], str(loaded[1])
