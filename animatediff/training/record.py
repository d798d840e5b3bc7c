"""What a run tells of itself: numbers in files, and its pace as a bar on a terminal or as lines elsewhere."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from animatediff.utils import UserError, replacing


class Record:
    """Called after each step; closed at the end.

    Args:
        folder: of log.jsonl, and of tensorboard/ where that is asked for.
        stage: its name.
        config: the LoopConfig.
        start: steps done before. What the files say of later ones, before the run was killed, is cut.
        log: takes lines.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, stage: str, config: Any, start: int, log: Callable[[str], None]):
        self.file, self.stage, self.config, self.start, self.log = folder / "log.jsonl", stage, config, start, log
        self.board = open_board(folder / "tensorboard", start) if config.tensorboard else None
        keep_steps(self.file, start)
        bar = sys.stderr.isatty() and multiprocessing.parent_process() is None  # of many at once, none can be read
        self.bar = tqdm(desc=stage, total=config.steps, initial=start, unit="step", disable=not bar)
        self.began = time.monotonic()

    def __call__(self, done: int, values: Mapping[str, float]) -> None:
        """Tell of the last of `done` steps. values: `loss` and other numbers of the loop and the stage."""
        pace = (done - self.start) / (time.monotonic() - self.began)
        samples = pace * self.config.batch_size * self.config.micro_batches
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {samples:.2f} samples/s", refresh=False)
        self.bar.update()
        if done % self.config.log_every and done != self.config.steps:
            return
        self._write(done, {**values, "steps_per_s": pace})
        if self.bar.disable:
            left = duration((self.config.steps - done) / pace)
            self.log(
                f"{self.stage} {done}/{self.config.steps} loss {values['loss']:.4f} {pace:.2f} steps/s, "
                f"{samples:.2f} samples/s, {left} left"
            )

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()

    def _write(self, done: int, values: Mapping[str, float]) -> None:
        finite = {k: float(f"{v:.5g}") for k, v in values.items() if math.isfinite(v)}  # JSON has no infinity
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": done, **finite}) + "\n")
        except OSError as error:
            raise UserError(f"got {self.file} to write to, expected a file with room: {error.strerror}") from None
        if self.board:
            for name, value in finite.items():
                self.board.add_scalar(name, value, done)
            self.board.flush()


def open_board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, because it is an extra
    except ImportError:
        raise UserError(
            'got tensorboard: true, which is not installed: pip install -e ".[tensorboard]", or leave it out '
            "(log.jsonl has the same numbers)"
        ) from None
    return SummaryWriter(str(folder), purge_step=start + 1)


def keep_steps(file: Path, last: int) -> None:
    """Cut what follows step `last` off a log, and what can be no line of it."""
    if not file.exists():
        return
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if step_of(line) <= last]
    if kept != lines:
        with replacing(file) as temporary:
            temporary.write_text("".join(kept))


def step_of(line: str) -> float:
    """Infinity for a line that was not written to its end."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf


def duration(seconds: float) -> str:
    """With the unit that fits: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
