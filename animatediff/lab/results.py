"""What a cell of a table leaves in its folder: `result.json`, which says how it came about, and a strip of frames."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animatediff.media.pictures import read_picture, write_picture
from animatediff.media.video import to_uint8
from animatediff.metrics.tables import INK, contact_sheet
from animatediff.utils import UserError, replacing
from animatediff.world.evaluate import Generate

STRIP = "strip.png"


def read_result(path: Path, made: str) -> dict[str, Any] | None:
    """The result in a file, None where there is none yet.

    Args:
        path: of the file.
        made: all that the result depends on.

    Raises:
        UserError: it is the result of something else, or damaged.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        found = result["made"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"got {path}, which is damaged ({error}): delete it and run again, which makes it anew"
        ) from None
    if found != made:
        raise UserError(f"got {path} of other values than the config's, expected the same: take another output_dir")
    return result


def write_result(path: Path, made: str, result: Mapping[str, Any]) -> None:
    """Write a file that appears whole or not at all."""
    write_text(path, json.dumps({"made": made, **result}, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keeping_strip(generate: Generate, folder: Path, number: int) -> Generate:
    """The same, and of clip `number` the frames side by side in `folder`/strip.png."""

    def watched(captions: list[str], numbers: list[int]) -> Tensor:
        clips = generate(captions, numbers)
        if number in numbers:
            frames = to_uint8(clips[numbers.index(number)].float().cpu() / 2 + 0.5)
            folder.mkdir(parents=True, exist_ok=True)
            write_picture(np.concatenate(list(frames), axis=1), folder / STRIP)
        return clips

    return watched


def stack_strips(folders: Mapping[str, Path], path: Path) -> bool:
    """One picture of the strips in some folders under their names; False where there is none."""
    strips = {name: read_picture(folder / STRIP) for name, folder in folders.items() if (folder / STRIP).exists()}
    if strips:
        write_picture(contact_sheet([([(name, INK)], strip[None]) for name, strip in strips.items()]), path)
    return bool(strips)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation of the values that are there."""
    there = np.array([value for value in values if value is not None])
    if not len(there):
        return "-"
    deviation = f" ± {there.std(ddof=1):.{digits}f}" if len(there) > 1 else ""
    return f"{there.mean():.{digits}f}{deviation}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def device_name(device: torch.device | str) -> str:
    """What to write under a table."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
