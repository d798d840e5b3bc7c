"""The processes of a run: one alone, or those that `torchrun` has started, which share clips or each clip."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from animatediff.utils import UserError, printable

SILENCE = 3600.0  # seconds without a step of any process, after which those that are missed are taken for dead
WAIT = timedelta(days=1)  # for each other: the first process may read large files, and write long clips
T = TypeVar("T")


class OneProcess:
    """A run's only process. Of several, the `first` shows progress and writes what belongs to no single clip.

    Attributes:
        spread: a `features.feature.Spread` where all of them make every clip together.
    """

    first = True
    spread: Callable[[Sequence[Callable[[], Any]], Any], Iterable[Any]] | None = None

    def splitting(self) -> OneProcess:
        """The same, making every clip together. Raises: UserError for one process."""
        raise UserError(
            "got --split-clips in one process, expected several that share every clip: torchrun --nproc_per_node 2 "
            "scripts/animate.py …, or leave it out"
        )

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process; the others wait for it. Once in a run."""
        return make()

    def take(self, jobs: Sequence[Any], bar: tqdm) -> Iterator[Any]:
        """The jobs of this process, each when the one before is `made`; the first one's end when all of the run are."""
        yield from jobs

    def stepped(self, bar: tqdm, clips: int = 1) -> int:
        """A step of a sampler is done here, of so many clips. Shows and returns how many are, in all processes."""
        bar.update(clips)
        return int(bar.n)

    def tell(self, line: str, file: TextIO | None = None) -> None:
        """Print a line above the bar, to stderr by default."""
        with tqdm.external_write_mode(file=file or sys.stderr):
            print(printable(line), file=file or sys.stderr, flush=True)

    def tell_once(self, line: str, file: TextIO | None = None) -> None:
        """Print what every process has to say, once."""
        self.tell(line, file)

    @contextmanager
    def one_error(self) -> Iterator[None]:
        """A mistake that all processes find, or one that ends them all, is one line."""
        yield


class ManyProcesses(OneProcess):
    """One of several processes.

    Args:
        store: what they share, a `torch.distributed.Store` that is new for each run.
        rank: the number of this one, from 0.
        number: of all.
    """

    def __init__(self, store: Any, rank: int, number: int):
        self._store, self.first, self._others = store, rank == 0, number - 1
        self._rank = rank

    def splitting(self) -> OneProcess:
        return SplitClips(self._store, self._rank, self._others + 1)

    def once(self, make: Callable[[], T]) -> T:
        if not self.first:
            return pickle.loads(self._store.get("once"))
        made = make()
        self._store.set("once", pickle.dumps(made))
        return made

    def take(self, jobs: Sequence[Any], bar: tqdm) -> Iterator[Any]:
        while (number := self._store.add("taken", 1)) <= len(jobs):
            yield jobs[number - 1]
        if self.first:
            self._wait(bar)
            yield from (job for job in jobs if not job.made)  # of processes that ended without their clip
        else:
            self._store.add("left", 1)

    def _wait(self, bar: tqdm) -> None:
        """Until all others have left."""
        steps, heard, waits = 0, time.monotonic(), True
        while waits:
            waits = self._store.add("left", 0) < self._others
            if (done := self._store.add("steps", 0)) != steps:
                steps, heard = done, time.monotonic()
                _show(bar, done)
            if time.monotonic() - heard > SILENCE:
                self.tell("other processes are silent: the first one makes the clips that they have not made")
                return
            time.sleep(0.1 * waits)

    def stepped(self, bar: tqdm, clips: int = 1) -> int:
        done = self._store.add("steps", clips)
        _show(bar, done)
        return done

    def tell(self, line: str, file: TextIO | None = None) -> None:
        if not self.first and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # the bar's line, which is the first one's
        super().tell(line, file)

    def tell_once(self, line: str, file: TextIO | None = None) -> None:
        if self._store.add(f"said: {line}", 1) == 1:
            self.tell(line, file)

    @contextmanager
    def one_error(self) -> Iterator[None]:
        from torch.distributed import DistNetworkError, DistStoreError

        try:
            yield
        except (UserError, OSError):
            if self._store.add("error", 1) == 1:
                raise
            time.sleep(1)  # torchrun ends all when one has ended: first the one that says it
            sys.exit(2)
        except KeyboardInterrupt:
            if self.first:
                raise
            sys.exit(130)
        except (DistNetworkError, DistStoreError):
            raise UserError("this process ends, too: another one has ended, which says why") from None


class SplitClips(ManyProcesses):
    """One of several processes that make every clip together: each computes its share of every step's tasks.

    All take every step of the sampler from the same numbers, and sum up in the same order, so that the clip is that of
    one process, on the CPU bit by bit. The first one writes it.
    """

    def __init__(self, store: Any, rank: int, number: int):
        import torch.distributed as dist

        super().__init__(store, rank, number)
        own = dist.PrefixStore("split", store)
        dist.init_process_group(store=own, rank=rank, world_size=number, timeout=WAIT)

    take, stepped = OneProcess.take, OneProcess.stepped  # every process makes every clip

    def tell(self, line: str, file: TextIO | None = None) -> None:
        if self.first:
            super().tell(line, file)

    def tell_once(self, line: str, file: TextIO | None = None) -> None:
        self.tell(line, file)

    def spread(self, tasks: Sequence[Callable[[], Any]], like: Any) -> Iterable[Any]:
        import torch
        import torch.distributed as dist

        number = self._others + 1
        own = {i: tasks[i]().contiguous() for i in range(self._rank, len(tasks), number)}
        for i in range(len(tasks)):
            made = own[i] if i in own else torch.empty_like(like, memory_format=torch.contiguous_format)
            dist.broadcast(made, src=i % number)
            yield made


def _show(bar: tqdm, done: int) -> None:
    bar.update(min(done, bar.total) - bar.n)  # a clip that is made again has its steps a second time


def launched() -> OneProcess:
    """This process among those that were started with it, by `torchrun` or whatever sets the same variables.

    Raises:
        UserError: some of the variables are missing.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return OneProcess()
    import torch.distributed as dist  # here, because a mistake of the command line is told before torch is imported

    try:
        store, rank, number = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise UserError(f"got WORLD_SIZE={os.environ['WORLD_SIZE']}, expected torchrun or none: {error}") from None
    store.set_timeout(WAIT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return ManyProcesses(dist.PrefixStore(f"processes {attempt}", store), rank, number)
