"""Reads clips of files in worker processes, a few micro-batches ahead."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from animatediff.training.data.clips import Clip, Log, Series
from animatediff.utils import UserError


class ClipBatch(NamedTuple):
    video: Tensor  # (b, f, 3, h, w) in [-1, 1]
    captions: list[str]
    names: list[str]  # of the files; none in the toy data set


class ClipReader:
    """Reads batches of a series, and tells of every file that is left out, once.

    Args:
        clips: the series.
        num_workers: processes that read, each a batch ahead, and no more than there are CPUs; 0 reads in this one.
        log: told of the files.
    """

    def __init__(self, clips: Series, *, num_workers: int, log: Log = print):
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.clips, self.num_workers, self.log = clips, min(num_workers, cpus), log
        self._left_out: set[str] = set()

    def batches(self, numbers: Iterable[Sequence[int]]) -> Generator[ClipBatch]:
        """The clips with these numbers, a batch for each.

        Raises:
            UserError: none of the files gives a clip, or the system has ended a worker.
        """
        loader = DataLoader(
            self.clips,
            batch_sampler=numbers,
            num_workers=self.num_workers,
            prefetch_factor=1 if self.num_workers else None,
            collate_fn=list,
            generator=torch.Generator(),  # of the workers' seeds, which nothing is drawn from
        )
        try:
            for clips in loader:
                yield self._stacked(clips)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(
                f"got a reader of clips that the system ended ({' '.join(str(error).split())[:200]}): lower "
                "num_workers or batch_size, or give it more (shared) memory"
            ) from None

    def _stacked(self, clips: Sequence[Clip]) -> ClipBatch:
        for path, problem in (item for clip in clips for item in clip.left_out.items()):
            if path not in self._left_out:
                self._left_out.add(path)
                count = f"{len(self._left_out)} of {len(self.clips.files)} files so far"
                self.log(f"left out {path}: {problem} ({count})")
        videos = [clip.pixels for clip in clips if clip.pixels is not None]
        if len(videos) < len(clips):
            raise UserError(
                f"got {len(self.clips.files)} files of which none gives a {self.clips.nothing}, expected at least one: "
                "--check-data says what is the matter with each"
            )
        return ClipBatch(torch.stack(videos), [clip.caption for clip in clips], [clip.path for clip in clips])
