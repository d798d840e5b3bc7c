"""Stage `ip_adapter`: pictures beside the prompt (IP-Adapter, arXiv 2308.06721), image model and encoder frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from animatediff.checkpoints.files import file_sha256
from animatediff.checkpoints.image_encoder_files import ImageEncoder, load_image_encoder
from animatediff.checkpoints.ip_adapter_files import load_ip_adapter, save_ip_adapter
from animatediff.checkpoints.load import ImageModel
from animatediff.config.settings import Float, Int, opt, options
from animatediff.features.ip_adapter import IPAdapters
from animatediff.models.ip_adapter_network import ImagePrompt, IPAdapter, build_ip_adapter, image_prompted
from animatediff.models.unet import UNet
from animatediff.pipeline.device import to_device
from animatediff.training.diffusion_stages import DiffusionStage, Save
from animatediff.training.latents import CAPTION_DROPOUT, Condition
from animatediff.training.losses import Denoise
from animatediff.training.sources import Data, resolve_path
from animatediff.training.stages import Training
from animatediff.utils import UserError

PICTURE_DROPOUT = 0.1  # fraction of pictures left out, half of them together with the caption, as in the paper


class IPAdapterStage(DiffusionStage):
    """`trainable` is the adapter; the picture is the frame that is denoised, as the encoder sees it.

    Args: as of `DiffusionStage`, and
        nothing: (1, …) what the encoder gives for no picture.
        caption_dropout: fraction of empty captions.
    """

    trainable: IPAdapter

    def __init__(self, *args: Any, nothing: Tensor, caption_dropout: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.nothing, self.caption_dropout = nothing, caption_dropout

    def denoiser(self, x0: Tensor, context: Tensor, generator: torch.Generator) -> Denoise:
        assert self.clips.condition is not None
        features = self.clips.condition[:, 0].to(x0)
        left_out = torch.rand(len(x0), generator=generator).to(x0.device)
        shape = (-1, *[1] * (features.dim() - 1))
        features = torch.where((left_out < PICTURE_DROPOUT).view(shape), self.nothing.to(features), features)
        empty = self.text_encoder(self.clips.empty[None].long().to(x0.device))
        context = self.without_captions(context, self.caption_dropout, generator)
        context = torch.where((left_out < PICTURE_DROPOUT / 2)[:, None, None], empty, context)
        prompt = ImagePrompt(self.trainable, self.trainable(features)[:, None])
        frames, levels = x0.shape[1], len(self.unet.config.block_out_channels)
        prompt.select(torch.arange(frames), torch.ones(frames), (x0.shape[-2], x0.shape[-1]), levels)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            with image_prompted(self.unet, [prompt]):
                return self.unet(x, t, context)

        return denoise


@options
class IPAdapterTraining(Training):
    """An IP-Adapter for an image model, on the features of an image encoder."""

    name: ClassVar[str] = "ip_adapter"
    stage_class: ClassVar[type[DiffusionStage]] = IPAdapterStage

    image_encoder: str = opt(..., "CLIP vision model whose features it sees: a folder or file")
    variant: Literal["base", "plus", "full"] = opt(
        "base", "base sees the picture's embedding, plus and full its tokens before the last layer"
    )
    tokens: Int = opt(4, "that a picture becomes; 16 in released files of plus, full has all of the encoder", ge=1)
    init_from: str = opt("", "an IP-Adapter to start from, in place of a fresh one")
    caption_dropout: Float = opt(CAPTION_DROPOUT, "fraction of empty captions", ge=CAPTION_DROPOUT, lt=1)

    def data(self) -> Data:
        return replace(super().data(), condition=self.condition())

    def condition(self) -> Condition:
        """What the adapter sees of every frame."""
        path = resolve_path(self.image_encoder)
        encoder = load_image_encoder(path)

        def make(video: Tensor) -> Tensor:
            pixels = encoder.pixels_of(video.flatten(0, 1))
            return self.seen(encoder, pixels).unflatten(0, video.shape[:2])

        return Condition({"image_features": f"{self.variant != 'base'} {file_sha256(path)}"}, make)

    def seen(self, encoder: ImageEncoder, pixels: Tensor) -> Tensor:
        return encoder.embeddings(pixels) if self.variant == "base" else encoder.hidden(pixels)

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        encoder = load_image_encoder(resolve_path(self.image_encoder))
        width = encoder.embedding_width if self.variant == "base" else encoder.width
        if self.init_from:
            adapter, _ = load_ip_adapter(resolve_path(self.init_from), unet)
            if (got := (adapter.config.variant, adapter.config.encoder_width)) != (self.variant, width):
                raise UserError(
                    f"init_from: got an adapter of variant {got[0]} on features of width {got[1]}, expected "
                    f"{self.variant} on {width}, those of image_encoder"
                )
        else:
            adapter = build_ip_adapter(unet, self.variant, encoder_width=width, tokens=self.tokens)
        adapter = to_device(adapter, unet.conv_in.weight.device, torch.float32).requires_grad_(True)

        def save(folder: Path, metadata: dict[str, str]) -> None:
            save_ip_adapter(adapter, folder / "ip_adapter.safetensors", metadata=metadata, dtype=torch.float16)

        return adapter, save

    def sample_networks(self, trainable: nn.Module) -> dict[str, nn.Module]:
        assert isinstance(trainable, IPAdapter)
        return {"ip_adapters": IPAdapters([trainable], load_image_encoder(resolve_path(self.image_encoder)))}

    def stage_options(self) -> dict[str, Any]:
        encoder = load_image_encoder(resolve_path(self.image_encoder))
        black = torch.zeros(1, 3, encoder.size, encoder.size)
        nothing = torch.zeros(1, encoder.embedding_width) if self.variant == "base" else encoder.hidden(black)
        return {"nothing": nothing, "caption_dropout": self.caption_dropout}
