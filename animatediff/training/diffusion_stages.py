"""Stages `image` and `motion`: the two trainings that AnimateDiff keeps apart (arXiv 2307.04725, sec. 4).

First an image model learns from single frames; then, with every weight of it frozen, motion modules learn from clips.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animatediff.checkpoints.export import save_image_model, save_motion_module
from animatediff.data.shapes import FRAMES
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.model_config import MotionConfig, ScheduleConfig, TextConfig, UNetConfig
from animatediff.models.attention import SpatialTransformer
from animatediff.models.layers import ResnetBlock
from animatediff.models.motion import MotionModule
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.training.latents import LatentClips


class ClipSource(Protocol):
    """Where a stage's clips come from."""

    def batch(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scaled latents (b, f, c, h, w), float32, and caption tokens (b, 77) of micro-batch `index` of the run.

        A share `latents.CAPTION_DROPOUT` of the captions is empty.
        """
        ...


class ImageStage:
    """UNet and text encoder learn to denoise single frames."""

    name = "image"

    def __init__(self, unet: UNetConfig, text: TextConfig, schedule: ScheduleConfig, vae: VAE, clips: LatentClips):
        self.unet, self.text_encoder, self.vae, self.clips = UNet(unet), TextEncoder(text), vae, clips
        self.unet.to(memory_format=torch.channels_last)
        self.schedule = NoiseSchedule(schedule)
        table = self.text_encoder.get_parameter("text_model.embeddings.token_embedding.weight")
        with torch.no_grad():  # words the world never says stay zero, and the file compresses
            said = torch.zeros(len(table), 1)
            said[torch.cat([clips.tokens.unique(), clips.empty.unique()]).long()] = 1
            table *= said

    def modules(self) -> nn.Module:
        return nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        which = self.clips.draw(batch_size, generator)
        frame = torch.randint(FRAMES, (batch_size,), generator=generator)
        x0 = self.clips.latents[which, frame].float()[:, None]
        context = embed(self.text_encoder, self.clips.captions(which, generator))
        t = torch.randint(self.schedule.config.num_train_timesteps, (batch_size,), generator=generator)
        return denoising_loss(self.unet, self.schedule, x0, t, context, generator), {}

    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        model = SimpleNamespace(
            unet=self.unet, vae=self.vae, text_encoder=self.text_encoder, schedule=self.schedule.config
        )
        save_image_model(
            model, folder / "image.safetensors", metadata=metadata | {"beta_schedule": "linear"}, dtype=torch.float16
        )


class MotionStage:
    """Motion modules learn to denoise clips inside a frozen image model, on the device where the two networks are.

    Args:
        unet: with the motion modules to train.
        text_encoder: of the image model.
        schedule: its noise, and what it predicts.
        clips: what is learnt from.
        noisy_share: of clips that are noised beyond the middle of the schedule whatever was drawn.
        autocast: run the UNet's matrix products and convolutions in bfloat16.
    """

    name = "motion"

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        clips: ClipSource,
        *,
        noisy_share: float = 0.0,
        autocast: bool = False,
    ):
        self.unet, self.text_encoder, self.clips = unet, text_encoder, clips
        self.schedule = NoiseSchedule(schedule)
        self.noisy_share, self.autocast = noisy_share, autocast
        text_encoder.requires_grad_(False)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_("motion_modules." in name)

    def modules(self) -> nn.Module:
        return self.unet

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x0, tokens = self.clips.batch(index, batch_size, generator)
        context = embed(self.text_encoder, tokens)
        total = self.schedule.config.num_train_timesteps
        t = torch.randint(total, (batch_size,), generator=generator)
        noisy = torch.rand(batch_size, generator=generator) < self.noisy_share
        t = torch.where(noisy, total // 2 + t // 2, t)
        with torch.autocast(context.device.type, torch.bfloat16, enabled=self.autocast):
            return denoising_loss(self.unet, self.schedule, x0, t, context, generator), {}

    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        save_motion_module(self.unet, folder / "motion.safetensors", metadata=metadata, dtype=torch.float16)


def checkpoint_activations(unet: UNet) -> None:
    """Keep only the inputs of the UNet's layers; the backward pass computes the rest again (arXiv 1604.06174).

    The gradients are the same, for about a third more time and a small part of the memory.
    """
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, SpatialTransformer, MotionModule)):
            module.forward = functools.partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


def insert_motion(unet: UNet, motion: MotionConfig) -> UNet:
    """A video model with the weights of an image model and fresh motion modules, which change nothing yet."""
    video = UNet(unet.config.with_motion(motion))
    missing, unexpected = video.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and all("motion_modules." in key for key in missing)
    return video


def denoising_loss(
    unet: UNet, schedule: NoiseSchedule, x0: Tensor, t: Tensor, context: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the network's prediction (Ho et al. 2020, Eq. 14), one timestep per clip.

    x0: clean scaled latents (b, f, c, h, w). t: (b,). context: (b, l, d) on the network's device, where all is moved.
    """
    noise = torch.randn(x0.shape, generator=generator)
    x0, noise, t = (tensor.to(context.device) for tensor in (x0, noise, t))
    prediction = unet(schedule.add_noise(x0, noise, t), t, context)
    return F.mse_loss(prediction.float(), schedule.target(x0, noise, t))


def embed(text_encoder: TextEncoder, tokens: Tensor) -> Tensor:
    """The text embedding (b, l, d) of tokens (b, l), where the text encoder is."""
    return text_encoder(tokens.to(next(text_encoder.parameters()).device))
