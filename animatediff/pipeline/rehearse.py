"""Loading without contents: files that do not fit each other are told before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from animatediff.checkpoints.files import without_contents
from animatediff.config.request import Request
from animatediff.features.registry import NETWORKS
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import Checked

PLAIN = {"model.base", "model.motion_module"}  # files of a plain request
QUICK = 50_000_000  # parameters that are loaded in a fraction of a second


def rehearse(checked: Iterable[Checked], *, loaded_next: bool = False) -> None:
    """Load every set of files once, as names and shapes alone.

    Left out is a first request of an image model and perhaps a motion module: loading them says the same as soon.

    Args:
        loaded_next: loading the first request comes next; then it is left out where its files are small, too.

    Raises:
        UserError: as `Assembler.load`.
    """
    assembler, known = Assembler(torch.device("meta"), torch.float32), []
    with without_contents():
        for i, one in enumerate(checked):
            if (wanted := _seen_by_loading(one.request)) in known:
                continue
            known.append(wanted)
            if i > 0 or not _told_as_soon(one, loaded_next):
                assembler.load(one)


def _told_as_soon(checked: Checked, loaded_next: bool) -> bool:
    infos = checked.headers.infos
    return infos.keys() <= PLAIN or (loaded_next and sum(info.num_parameters for info in infos.values()) <= QUICK)


def _seen_by_loading(request: Request) -> list[Any]:
    """All of a request that decides what is loaded, and whether it fits."""
    groups = ("model", "size", "windows", *NETWORKS)
    return [request.prompts.clip_skip, *(getattr(request, group) for group in groups)]
