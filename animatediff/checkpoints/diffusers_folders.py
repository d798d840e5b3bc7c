"""Folders as diffusers has them, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from animatediff.checkpoints.diffusers_json import UNET_STEM, Json
from animatediff.checkpoints.files import StateDict, replacing, write_state_dict
from animatediff.utils import UserError


@contextmanager
def model_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when all is written; only of another model, as all in it is lost.

    Raises:
        UserError: `path` is something else.
    """
    path = Path(path)
    is_model = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_model):
        what = "a file" if path.is_file() else "a folder with other content"
        raise UserError(f"got {path} to write a model folder to, expected a new name: it is {what}")
    with replacing(path) as new:
        yield new


def write_part(
    folder: Path, tensors: StateDict, config: Json, *, stem: str = UNET_STEM, metadata: Mapping[str, str] | None = None
) -> None:
    """One network: its weights, and its sizes as config.json."""
    write_json(folder / "config.json", config)
    write_state_dict(folder / f"{stem}.safetensors", tensors, metadata=metadata)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
