"""What a diffusion training consists of: which parameters learn, from which batches, by which loss, saved how.

AnimateDiff keeps its trainings apart (arXiv 2307.04725, sec. 4): an image model learns from single frames, with every
weight of it frozen motion modules learn from clips, and LoRAs adapt either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from animatediff.config.networks import MotionConfig, ScheduleConfig
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.models.attention import SpatialTransformer
from animatediff.models.layers import ResnetBlock
from animatediff.models.motion import MotionModule
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.training.latents import CAPTION_DROPOUT
from animatediff.training.loop import Stage
from animatediff.training.losses import MEAN_SQUARE, Denoise, LossConfig, denoising_loss

Save = Callable[[Path, dict[str, str]], object]


class ClipSource(Protocol):
    """Where a stage's clips come from."""

    names: list[str]  # of the clips of the last batch, for messages
    empty: Tensor  # tokens (77,) of the empty caption
    condition: Tensor | None  # of the last batch, (b, f, …), where the source was asked for one

    def batch(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scaled latents (b, f, c, h, w), float32, and caption tokens (b, 77) of micro-batch `index` of the run.

        A fraction `latents.CAPTION_DROPOUT` of the captions is empty. Pictures are clips of one frame.
        """
        ...

    def close(self) -> None:
        """No more batches are needed."""


class DiffusionStage(Stage):
    """Some parameters learn to denoise clips or pictures, on the device where the networks are.

    Args:
        name: for messages.
        unet, text_encoder: what denoises.
        schedule: its noise, and what it predicts.
        clips: what is learnt from.
        trainable: the module whose parameters with `requires_grad` are trained.
        save: writes what was learnt: (folder, metadata).
        loss: variants of the loss.
        high_noise_fraction: of clips that are noised beyond the middle of the schedule whatever was drawn.
        autocast: run the UNet's matrix products and convolutions in this dtype.
    """

    def __init__(
        self,
        name: str,
        unet: UNet,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        clips: ClipSource,
        *,
        trainable: nn.Module,
        save: Save,
        loss: LossConfig = MEAN_SQUARE,
        high_noise_fraction: float = 0.0,
        autocast: torch.dtype | None = None,
    ):
        self.name, self.unet, self.text_encoder, self.clips = name, unet, text_encoder, clips
        self.schedule = NoiseSchedule(schedule)
        self.trainable, self.save = trainable, save
        self.loss_config, self.high_noise_fraction, self.autocast = loss, high_noise_fraction, autocast
        self.scale_loss = autocast == torch.float16

    def modules(self) -> nn.Module:
        return self.trainable

    def names(self) -> list[str]:
        return self.clips.names

    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        self.save(folder, metadata)

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x0, tokens = self.clips.batch(index, batch_size, generator)
        device = next(self.unet.parameters()).device
        total = self.schedule.config.num_train_timesteps
        t = torch.randint(total, (batch_size,), generator=generator)
        if self.high_noise_fraction:
            noisy = torch.rand(batch_size, generator=generator) < self.high_noise_fraction
            t = torch.where(noisy, total // 2 + t // 2, t)
        x0, context = x0.to(device), self.text_encoder(tokens.to(device))
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            denoise = self.denoiser(x0, context, generator)
            return denoising_loss(denoise, self.schedule, x0, t, generator, self.loss_config), {}

    def without_captions(self, context: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
        """The context (b, l, d) with a fraction of the captions left empty, with those that the source left out."""
        further = (fraction - CAPTION_DROPOUT) / (1 - CAPTION_DROPOUT)
        dropped = torch.rand(len(context), 1, 1, generator=generator) < further
        empty = self.text_encoder(self.clips.empty[None].long().to(context.device))
        return torch.where(dropped.to(context.device), empty, context)

    def denoiser(self, x0: Tensor, context: Tensor, generator: torch.Generator) -> Denoise:
        """The network as a function of (x, t); a stage whose network is told more overrides this.

        x0: clean latents (b, f, c, h, w). context: (b, l, d). generator: of all that is drawn for this batch.
        """
        return lambda x, t: self.unet(x, t, context)


def freeze(*networks: nn.Module) -> None:
    for network in networks:
        network.requires_grad_(False)


def unfreeze_motion_modules(unet: UNet) -> UNet:
    """Of a frozen UNet: its motion modules are what is trained."""
    for _, parameter in unet.motion_parameters():
        parameter.requires_grad_(True)
    return unet


def checkpoint_activations(network: nn.Module) -> None:
    """Keep only the inputs of the network's layers; the backward pass computes the rest again (arXiv 1604.06174).

    The gradients are the same, for about a third more time and a small part of the memory.
    """
    for module in network.modules():
        if isinstance(module, (ResnetBlock, SpatialTransformer, MotionModule)):
            module.forward = functools.partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


def insert_motion(unet: UNet, motion: MotionConfig, *, zero_init: bool = True) -> UNet:
    """A video model with the weights of an image model and fresh motion modules.

    They change nothing yet, unless the last layer of each is drawn like any other (`zero_init` off).
    """
    video = UNet(unet.config.with_motion(motion))
    missing, unexpected = video.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and all("motion_modules." in key for key in missing)
    for module in video.modules():
        if isinstance(module, MotionModule) and not zero_init:
            module.temporal_transformer.proj_out.reset_parameters()
    return video
