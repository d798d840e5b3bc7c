"""One job at a time, in the order they came, and a journal from which it can be told what was never finished."""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from animatediff.utils import UserError, replacing, try_lock

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
MAX_WAITING = 200  # jobs: more than anybody waits for
MAX_ENDED = 200  # that are remembered


class Cancelled(Exception):
    """Raised in a job that somebody has called off."""


@dataclass
class Job:
    """One thing to make.

    Attributes:
        owner: whoever may call it off.
        settings: what JSON can hold, enough to make it again.
        note: what the work leaves for itself in the journal, such as the folder it began.
        result: what the work gave back.
        message: why it failed, or what it is doing.
        preview: encoded picture of how far it is.
    """

    owner: str
    title: str
    settings: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    note: str = ""
    state: str = WAITING
    result: str = ""
    message: str = ""
    done: int = 0
    total: int = 0
    preview: bytes = b""
    sampling_since: float = 0.0
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)

    def check(self) -> None:
        """Raises: Cancelled once it was called off; for the work to ask as often as it can stop."""
        if self.cancel.is_set():
            raise Cancelled

    def step(self, done: int, total: int) -> None:
        """Say how far it is; the first step's time is known from when `sampling_since` was set."""
        self.check()
        self.done, self.total = done, total

    @property
    def seconds_left(self) -> float | None:
        """By the mean of the steps so far; None before the first."""
        if not self.done or self.state != RUNNING:
            return None
        return (time.monotonic() - self.sampling_since) / self.done * (self.total - self.done)


class Journal:
    """A line for everything that happens to a job, on the disk before it goes on; read once, at the next start."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = _lock(path.with_suffix(".lock"))
        self.unfinished = self._read()
        with replacing(path) as temporary:  # only what still matters
            temporary.write_text("".join(_line(job, WAITING) for job in self.unfinished), encoding="utf-8")

    def write(self, job: Job) -> None:
        self._append(_line(job, job.state))

    def forget(self) -> None:
        """What was unfinished is not asked about again."""
        forgotten, self.unfinished = self.unfinished, []
        self._append("".join(_line(job, CANCELLED) for job in forgotten))

    def _append(self, lines: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:  # a full disk: clips may still be read, and what runs may still be called off
            print(f"{self.path} cannot be written: {error.strerror}", file=sys.stderr)

    def _read(self) -> list[Job]:
        found: dict[str, Job] = {}
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                entry = json.loads(line)
                job = Job("", entry["title"], entry["settings"], entry["id"], entry["note"])
                if not all(isinstance(t, str) for t in (job.title, job.id, job.note)) or type(job.settings) is not dict:
                    continue
            except (ValueError, KeyError, TypeError):  # the line at which the machine lost its power
                continue
            if entry.get("state") in (WAITING, RUNNING):
                found[job.id] = job
            else:
                found.pop(job.id, None)
        return list(found.values())


def _lock(path: Path) -> Any:
    """A file that one process at a time holds, where the system can tell.

    Raises:
        UserError: another process does.
    """
    file = path.open("w")
    if not try_lock(file):
        raise UserError(f"got {path.parent}, in which another page is at work: choose another --output-dir")
    return file


def _line(job: Job, state: str) -> str:
    said = {"id": job.id, "state": state, "note": job.note, "title": job.title, "settings": job.settings}
    return json.dumps(said, ensure_ascii=True) + "\n"


class JobQueue:
    """Jobs and the thread that does them.

    Args:
        work: does one job and gives back its result; it calls `job.check()` as often as it can stop.
        journal: of this queue alone.
    """

    def __init__(self, work: Callable[[Job], str], journal: Journal):
        self.work, self.journal = work, journal
        self.jobs: dict[str, Job] = {}
        self.finished = 0  # counts results, so that a page knows when to look for new ones
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="jobs").start()

    def submit(self, owner: str, title: str, settings: dict[str, Any], *, note: str = "", id: str = "") -> Job:
        """Put a job at the end.

        Raises:
            UserError: too many are waiting.
        """
        job = Job(owner, title, settings, note=note, **({"id": id} if id else {}))
        with self._changed:
            if len(self.waiting()) >= MAX_WAITING:
                raise UserError(f"got {MAX_WAITING} clips that wait already, expected fewer: try again later")
            self.journal.write(job)
            self.jobs[job.id] = job
            self._changed.notify()
        return job

    def resume(self, owner: str) -> int:
        """Put what an earlier run of the program did not finish at the end, as much as may wait; how many jobs."""
        count = 0
        while self.journal.unfinished and len(self.waiting()) < MAX_WAITING:
            job = self.journal.unfinished[0]
            self.submit(owner, job.title, job.settings, note=job.note, id=job.id)
            self.journal.unfinished.pop(0)
            count += 1
        return count

    def cancel(self, owner: str, ids: list[str]) -> None:
        """Call off jobs, those of this owner: what waits at once, what runs as soon as it asks."""
        with self._changed:
            for job in (self.jobs[i] for i in ids if i in self.jobs):
                if job.owner == owner and not job.ended:
                    job.cancel.set()
                    if job.state == WAITING:
                        self._end(job, CANCELLED)

    def of(self, owner: str) -> list[Job]:
        """The jobs of an owner, the oldest first."""
        return [job for job in list(self.jobs.values()) if job.owner == owner]

    def waiting(self) -> list[Job]:
        """All that have not begun, in their order."""
        return [job for job in list(self.jobs.values()) if job.state == WAITING]

    def before(self, job: Job) -> int:
        """How many are done before a waiting one."""
        waiting = self.waiting()
        running = any(other.state == RUNNING for other in list(self.jobs.values()))
        return (waiting.index(job) if job in waiting else 0) + running

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self.waiting)
                job = self.waiting()[0]
                job.state = RUNNING
                self.journal.write(job)
            try:
                job.result = self.work(job)
                state = DONE
            except Cancelled:
                state = CANCELLED
            except UserError as error:
                state, job.message = FAILED, str(error)
            except Exception as error:  # the thread serves those who wait behind this job
                traceback.print_exc(file=sys.stderr)
                state, job.message = FAILED, f"a fault of this program ({type(error).__name__}): see its console"
            with self._changed:
                self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.state, job.preview = state, b""
        self.finished += state == DONE
        self.journal.write(job)
        ended = [other.id for other in self.jobs.values() if other.ended]
        for id in ended[:-MAX_ENDED]:
            del self.jobs[id]
