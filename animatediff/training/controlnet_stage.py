"""Stage `controlnet`: hints of what is where (ControlNet, arXiv 2302.05543), the image model frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from animatediff.checkpoints.controlnet_files import load_controlnet, save_controlnet
from animatediff.checkpoints.load import ImageModel
from animatediff.config.settings import Float, opt, options
from animatediff.models.controlnet_network import ControlNet, build_controlnet
from animatediff.models.unet import UNet
from animatediff.pipeline.device import to_device
from animatediff.training.diffusion_stages import DiffusionStage, Save
from animatediff.training.latents import CAPTION_DROPOUT, SCRIBBLES
from animatediff.training.losses import Denoise
from animatediff.training.sources import Data, resolve_path
from animatediff.training.stages import Training


class ControlNetStage(DiffusionStage):
    """`trainable` is the ControlNet; what it adds goes into the frozen network, through which its gradients come.

    Args: as of `DiffusionStage`, and
        caption_dropout: fraction of empty captions, so that hints and not words say what is where.
    """

    trainable: ControlNet

    def __init__(self, *args: Any, caption_dropout: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.caption_dropout = caption_dropout

    def denoiser(self, x0: Tensor, context: Tensor, generator: torch.Generator) -> Denoise:
        assert self.clips.condition is not None
        hints = self.clips.condition[:, :, None].expand(-1, -1, 3, -1, -1).to(x0)
        embedded = self.trainable.embed(hints.flatten(0, 1))
        context = self.without_captions(context, self.caption_dropout, generator)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            down, mid = self.trainable(x, t, context, embedded)
            return self.unet(x, t, context, down_residuals=down, mid_residual=mid)

        return denoise


@options
class ControlNetTraining(Training):
    """A ControlNet for drawings: white lines on black along the edges of pictures, which are drawn on the way."""

    name: ClassVar[str] = "controlnet"
    stage_class: ClassVar[type[DiffusionStage]] = ControlNetStage

    init_from: str = opt("", "a ControlNet to start from, in place of the image model's own encoder")
    caption_dropout: Float = opt(0.5, "fraction of empty captions, as in the paper", ge=CAPTION_DROPOUT, lt=1)

    def data(self) -> Data:
        return replace(super().data(), condition=SCRIBBLES)

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        assert base.vae is not None
        if self.init_from:
            network, _ = load_controlnet(resolve_path(self.init_from), unet, base.vae)
        else:
            network = build_controlnet(unet, downsampling=base.vae.config.downsampling)
        network = to_device(network, unet.conv_in.weight.device, torch.float32).requires_grad_(True)

        def save(folder: Path, metadata: dict[str, str]) -> None:
            save_controlnet(network, folder / "controlnet.safetensors", metadata=metadata, dtype=torch.float16)

        return network, save

    def sample_networks(self, trainable: nn.Module) -> dict[str, nn.Module]:
        return {"controlnets": nn.ModuleList([trainable])}

    def stage_options(self) -> dict[str, Any]:
        return {"caption_dropout": self.caption_dropout}
