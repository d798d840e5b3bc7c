"""Where networks run, and in which type."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import nn

from animatediff.utils import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
M = TypeVar("M", bound=nn.Module)


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


def own_device(name: str = "auto") -> torch.device:
    """As `pick_device`, for the rest of the program: of torchrun's processes on a machine each has a GPU of its own.

    Raises:
        UserError: as `pick_device`; more processes than GPUs.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if "LOCAL_RANK" in os.environ and device.index is None:
        number, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if number > gpus:
            raise UserError(f"got {number} processes for {gpus} GPUs, expected one for each: --nproc_per_node {gpus}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type of a name, or a type itself; by default float16 on CUDA and float32 elsewhere, where half is slower.

    Raises:
        UserError: another one.
    """
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def has_own_memory(device: torch.device) -> bool:
    """Whether it is apart from the machine's."""
    return device.type == "cuda"


def to_device(module: M, device: torch.device, dtype: torch.dtype) -> M:
    """Move a network, and give its images the memory format that the device's convolutions like best.

    On CUDA that is channels_last, in which a feature map is a matrix of tokens already; on the CPU torch's default.
    """
    module = module.to(device, dtype)
    return module.to(memory_format=torch.channels_last) if device.type == "cuda" else module
