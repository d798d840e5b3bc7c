"""The networks of one pipeline, and what their files say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from animatediff.checkpoints.lora_files import read_lora
from animatediff.checkpoints.textual_inversion import load_bundled_embeddings
from animatediff.config.memory_options import Memory
from animatediff.config.networks import Distillation, Recipe, ScheduleConfig, recipe_of
from animatediff.models.lora import LoRAStack
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE


@dataclass
class Model:
    """What turns a prompt into a clip. `loras` are merged into UNet and text encoders, at scales that may change.

    Attributes:
        schedule: the noise schedule that the UNet was trained with.
        lora_roles: LoRA's name -> the option of `Request.model` that named it: loras, motion_loras, adapter.
        networks: further networks, by the group of the request that they belong to.
        distillation: what the motion module needs, if it was distilled to few steps.
        reports: one line for each file that was loaded.
        text_encoder_2, tokenizer_2: SDXL's; its refiner has no first ones.
        memory: how it was loaded.
    """

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder | None
    tokenizer: Tokenizer
    schedule: ScheduleConfig
    loras: LoRAStack
    lora_roles: Mapping[str, str] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    distillation: Distillation | None = None
    reports: tuple[str, ...] = ()
    text_encoder_2: TextEncoder | None = None
    tokenizer_2: Tokenizer | None = None
    memory: Memory = field(default_factory=Memory)

    @property
    def sparsectrl(self) -> nn.Module | None:
        return self.networks.get("sparsectrl")

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def add_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Load a LoRA on top of those that are there; returns its name.

        Raises:
            UserError: another kind of file, layers that these networks do not have, or a name that is taken.
        """
        lora = read_lora(Path(path), name=name or Path(path).stem)
        report = self.loras.add(lora, scale)
        self.lora_roles = {**self.lora_roles, lora.name: "motion_loras" if lora.kind == "motion-lora" else "loras"}
        second = self.text_encoder_2 and (self.text_encoder_2, self.tokenizer_2)
        words = load_bundled_embeddings(lora, self.text_encoder, self.tokenizer, second=second)
        self.reports = (*self.reports, str(report), *words)
        return lora.name

    def modules(self) -> list[nn.Module]:
        """Every network."""
        networks = [self.unet, self.vae, self.text_encoder, self.text_encoder_2, *self.networks.values()]
        return [network for network in networks if network is not None]

    def text_encoders(self) -> list[tuple[TextEncoder, Tokenizer]]:
        """Every text encoder and its tokenizer."""
        pairs = ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        return [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None and tokenizer is not None]

    @property
    def zeros_for_no_prompt(self) -> bool:
        """Whether zeros stand for no negative prompt, as SDXL was trained; all others take an empty text."""
        return self.text_encoder is not None and self.text_encoder_2 is not None

    @property
    def recipe(self) -> Recipe:
        """How models of its family are sampled where nobody says."""
        config = self.unet.config
        return recipe_of(config.motion and config.motion.version, sdxl=bool(config.added_channels))
