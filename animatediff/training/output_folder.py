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
from animatediff.utils import UserError, remove_leftovers, replacing


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
    with open(path / ".lock", "a") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"got output_dir {path}, in which another training is at work, expected a folder of its own: wait for "
                "it, or choose another"
            ) from None
        remove_leftovers(path)
        yield path


def _lock(file: int) -> None:
    """Until the process ends, however it does; forked readers of clips do not hold it."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
