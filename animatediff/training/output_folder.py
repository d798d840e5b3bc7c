"""The folder of a training: for one run at a time, with files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from animatediff.checkpoints.pickles import DAMAGE
from animatediff.training.distributed import rank_and_world_size
from animatediff.utils import UserError, only_writer, replacing


@contextmanager
def training_folder(path: str | Path) -> Iterator[Path]:
    """The folder, made where it is missing and cleared of what a killed run left half written, for this run alone.

    Raises:
        UserError: another training is at work in it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if rank_and_world_size()[0] > 0:  # the first process has it for all
        yield path
        return
    with only_writer(path, option="output_dir", work="training"):
        yield path


def write_tensors(path: Path, state: Mapping[str, Any], *, previous: Path | None = None) -> None:
    """Write a file that `read_tensors` reads; the one it replaces is kept as `previous`."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)  # a run that is killed here goes on from it


def read_tensors(path: Path, *, keys: set[str], remedy: str) -> dict[str, Any]:
    """A file that a training wrote, its tensors mapped.

    Args:
        path: of the file.
        keys: that it has at least.
        remedy: what happens when it is deleted and the training is started again.

    Raises:
        UserError: it is damaged, or no such file.
    """
    try:
        # Mapped, as every process of a machine reads it; on Windows that would keep it from being replaced.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    except DAMAGE as error:
        raise damaged(path, error, remedy) from None
    if not isinstance(state, dict) or (missing := keys - state.keys()):
        raise damaged(path, f"without {min(missing)}" if isinstance(state, dict) else "no mapping", remedy)
    return state


def damaged(path: Path, reason: object, remedy: str) -> UserError:
    return UserError(
        f"got {path}, which cannot be read ({' '.join(str(reason).split())[:100]}), expected a file of this training: "
        f"if it is damaged, delete it and run again, {remedy}"
    )
