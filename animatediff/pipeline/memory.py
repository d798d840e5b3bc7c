"""How networks are held: where their weights rest, and how much of a clip their layers take at once."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from animatediff.config.memory_options import Memory
from animatediff.models.chunks import set_chunk
from animatediff.models.resting_weights import FLOAT8, RestingWeights, find_units
from animatediff.models.unet import UNet
from animatediff.pipeline.device import DTYPES, has_own_memory, to_device
from animatediff.pipeline.model import Model
from animatediff.utils import UserError

M = TypeVar("M", bound=nn.Module)
CPU = torch.device("cpu")
FIXED = (
    "the LoRAs and their scales are fixed while weights rest in 8 bits: name them in the config, or load without "
    "memory.weights=float8"
)


def check_memory(memory: Memory, device: torch.device) -> None:
    """Raises: UserError for weights that cannot leave the device."""
    if memory.offload != "none" and not has_own_memory(device):
        raise UserError(
            f"offload: got {memory.offload} for the device {device.type}, whose memory is the machine's own, expected "
            "none: choose weights_dtype=float16 to hold less"
        )


def place(network: M, memory: Memory, device: torch.device, dtype: torch.dtype) -> M:
    """A loaded network as it is to be held: on the device, or resting elsewhere or in fewer bits."""
    away = CPU if memory.offload != "none" else None
    if not isinstance(network, UNet):
        if away is None:
            return to_device(network, device, dtype)
        RestingWeights(network, device, dtype, rest_device=away, blocks=find_units(network))
        return network
    away = CPU if memory.offload == "blocks" else None
    if away is None and storage_of(memory) in (None, dtype):
        return to_device(network, device, dtype)
    RestingWeights(network, device, dtype, storage=storage_of(memory), rest_device=away)
    return network


def storage_of(memory: Memory) -> torch.dtype | None:
    """What the UNet's weights rest in; None: what they compute in."""
    return ({**DTYPES, "float8": FLOAT8}).get(memory.weights)


def apply_memory(model: Model, memory: Memory) -> None:
    """Let the networks of a model take as much of a clip at once as a request says."""
    for network in (model.unet, *model.networks.values()):
        set_chunk(network, memory.chunk_tokens)
    model.vae.tile, model.vae.chunk_frames = memory.vae_tile, memory.vae_frames
