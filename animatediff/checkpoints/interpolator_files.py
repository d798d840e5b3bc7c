"""Learned models of frames between frames: RIFE's weights, and TorchScript programs such as FILM's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.checkpoints.files import StateDict, read_state_dict
from animatediff.checkpoints.load import blank, load_strictly
from animatediff.checkpoints.pickles import is_torchscript
from animatediff.media.interpolate import Between
from animatediff.models.ifnet import VERSIONS, IFNet
from animatediff.utils import UserError

SCRIPT_MULTIPLE = 64  # pixels: sides that TorchScript programs take
USED = re.compile(r"^(block\d+|encode)\.")  # of RIFE's files; the rest was there for training alone


def load_interpolator(path: Path, device: torch.device | str = "cpu") -> Between:
    """A learned model of frames between frames, from RIFE's weights or from a TorchScript program, which is run.

    A program is called as `model(first, last, t)` with frames (n, 3, H, W) in [0, 1], sides multiples of 64, and times
    (n, 1), and gives frames of that shape.

    Raises:
        UserError: as `read_rife`, or a program that cannot be loaded.
    """
    if is_torchscript(path):
        return _between(path, _program(path, device), SCRIPT_MULTIPLE)
    version, tensors = read_rife(path)
    model = load_strictly(blank(IFNet, VERSIONS[version]), tensors, f"RIFE {version}", path).to(device)
    return _between(path, model, model.config.multiple)


def check_interpolator(path: Path) -> None:
    """Raises: UserError for a file that `load_interpolator` refuses, as far as can be told without loading it."""
    if not is_torchscript(path):
        read_rife(path)


def read_rife(path: Path) -> tuple[str, StateDict]:
    """The version and the weights in RIFE's file.

    Raises:
        UserError: another file, or a version that is not known here.
    """
    tensors = {key: t.float() for key, t in read_state_dict(path).tensors.items() if USED.match(key)}
    if (version := rife_version(tensors)) is None:
        raise UserError(
            f"got {path}, expected RIFE's weights of a version that is known here ({'; '.join(VERSIONS)}) or a "
            "TorchScript program such as FILM's film_net_fp32.pt: choose one, or leave finish.interpolator out, and "
            "frames are made by the clip's own motion"
        )
    return version, tensors


def rife_version(tensors: StateDict) -> str | None:
    """The row of VERSIONS whose names and shapes these are, all of them; None for others."""
    shapes = {key: t.shape for key, t in tensors.items()}
    for version, config in VERSIONS.items():
        if shapes == {key: t.shape for key, t in blank(IFNet, config).state_dict().items()}:
            return version
    return None


def _program(path: Path, device: torch.device | str) -> Callable[..., Tensor]:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise UserError(f"got {path}, a TorchScript program that cannot be loaded: {reason}") from None


def _between(path: Path, model: Callable[..., Tensor], multiple: int) -> Between:
    """A model that is called with frames in [0, 1] of fitting sizes, as one that takes any."""

    def between(first: Tensor, last: Tensor, times: Tensor) -> Tensor:
        height, width = first.shape[-2:]
        padding = (0, -width % multiple, 0, -height % multiple)
        padded = [F.pad(frame * 0.5 + 0.5, padding, mode="replicate") for frame in (first, last)]
        try:
            made = model(*padded, times[:, None])
        except RuntimeError as error:
            last_line = str(error).strip().splitlines()[-1][:200]
            raise UserError(f"got {path}, which cannot be called with two frames and a time: {last_line}") from None
        if not isinstance(made, Tensor) or made.shape != padded[0].shape:
            got = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(f"got {path}, which gives {got} for frames of {tuple(padded[0].shape)}, expected as many")
        return made.float()[..., :height, :width].clamp(0, 1) * 2 - 1

    return between
