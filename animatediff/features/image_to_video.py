"""AnimateLCM-I2V (arXiv 2402.00769): a motion module that animates a given picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from animatediff.checkpoints.load import ImageModel
from animatediff.config.request import Request
from animatediff.features.feature import FrameDenoise, Run
from animatediff.features.guide_pictures import picture_latents
from animatediff.features.pia import load_condition
from animatediff.models.image_to_video_network import LevelFeatures, level_features_added
from animatediff.models.unet import UNet


@contextmanager
def image_to_video(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`i2v`: a picture, and how far the frames may go from it. Positions count from each window's first frame."""
    options = run.request.i2v
    if options.image is None:
        yield denoise
        return
    latents = run.once("i2v", lambda: picture_latents(options.image, run))
    features = LevelFeatures()

    def animated(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        count = len(frames)
        features.values = run.once(f"i2v of {count} frames", lambda: run.model.networks["i2v"](
            latents.expand(count, -1, -1, -1), options.drift))  # fmt: skip
        return denoise(x, t, frames, **inputs)

    with level_features_added(run.model.unet, features):
        yield animated


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[nn.Module, str] | None:
    """The encoder of AnimateLCM-I2V's picture, and a line about it; None where the motion module is another one."""
    return load_condition("animatelcm-i2v", headers, image)
