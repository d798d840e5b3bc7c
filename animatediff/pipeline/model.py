"""The networks of one pipeline, and the policies of where they run, in which type, and from which noise."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import Distillation, ScheduleConfig
from animatediff.config.steering import Steering
from animatediff.features.prompt_travel import Travel
from animatediff.features.windows import Windows
from animatediff.models.lora import LoRAStack
from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
M = TypeVar("M", bound=nn.Module)


@dataclass
class Components:
    """What turns a prompt into a clip. `loras` are merged into `unet` and `text_encoder`, at scales that may change."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: ScheduleConfig
    loras: LoRAStack
    reports: tuple[str, ...] = ()  # one line for each file that was loaded
    sampler: str = "ddim"  # where a call does not say
    windows: Windows | None = None  # where a call does not say
    lora_keys: Mapping[str, str] = field(default_factory=dict)  # LoRA's name -> key of the config that named it
    steering: Steering = Steering()  # where a call does not say
    travel: Travel = Travel()  # where a call does not say, as the next two
    prompt_weighting: bool = False
    clip_skip: int = 1
    distillation: Distillation | None = None  # what the motion module needs, if it was distilled to few steps
    sparsectrl: SparseCtrl | None = None

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name: "auto" is CUDA where there is one, else MPS, else the CPU.

    Raises:
        UserError: the device is unknown or not here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdecimal()):
        raise UserError(f"got device {name!r}, expected auto, cuda, mps or cpu")
    if not available[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        here = ", ".join(kind for kind, here in available.items() if here)
        raise UserError(f"got device {name!r}, which is not available: use auto, or one of {here}")
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of a name; without one, float16 on CUDA and float32 elsewhere, where half precision is slower.

    Raises:
        UserError: an unknown name.
    """
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def place(module: M, device: torch.device, dtype: torch.dtype) -> M:
    """Move a network, and give its images the memory format that the device's convolutions like best.

    On CUDA that is channels_last, in which a feature map is a matrix of tokens already; on the CPU torch's default.
    """
    module = module.to(device, dtype)
    return module.to(memory_format=torch.channels_last) if device.type == "cuda" else module


def share_weights(module: M) -> M:
    """A second module on the same storage: moving it, or giving it other weights, leaves the first as it was."""
    twins = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) if isinstance(p, nn.Parameter) else p.detach()
        for p in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, twins)


def draw_seed() -> int:
    """A seed from the system's randomness, 0 … 2^64 - 1; torch's own generators are left alone."""
    return secrets.randbits(64)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator: equal seeds give equal noise on every device.

    Raises:
        UserError: the seed is not within 0 … 2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"got seed {seed}, expected 0 to 2^64 - 1")
    return torch.Generator("cpu").manual_seed(seed)


def make_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The start of a clip, as `torch.manual_seed(seed); torch.randn(shape)` gives it on the CPU.

    Args:
        seed: 0 … 2^64 - 1.
        shape: (1, c, f, h, w), the order in which the official code draws.

    Returns:
        Standard normal float32 (1, f, c, h, w) on the CPU.
    """
    return draw_noise([seeded(seed)], shape[1:])


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Noise of clips that each have a generator (or share one, in turn), whatever else is in the batch.

    Args:
        generators: one per clip, on any device.
        shape: (c, f, h, w) of one clip.

    Returns:
        Standard normal float32 (b, f, c, h, w) on the CPU.
    """
    clips = [torch.randn(1, *shape, generator=g, device=g.device).cpu() for g in generators]
    return rearrange(torch.cat(clips), "b c f h w -> b f c h w")
