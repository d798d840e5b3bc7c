"""Runs what experiments consist of, trainings and measurements, each after those it needs; what is done stays done."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from animatediff.lab.results import device_name, read_result, write_result
from animatediff.training.stage_config import StageConfig
from animatediff.utils import UserError, keep_freed_memory

Log = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """Something to do, which is done where its result is there."""

    run: Callable[..., Any]
    arguments: tuple  # before the device
    needs: frozenset[str] = frozenset()  # tasks that come before


def run_tasks(tasks: Mapping[str, Task], *, jobs: int = 1, device: str = "cpu") -> None:
    """Do all tasks.

    Args:
        tasks: by name.
        jobs: processes at a time, each on one CPU core; 1 works in this one.
        device: where.

    Raises:
        UserError: tasks that wait for each other, or what one of them raises; the others that run are finished.
    """
    waiting = ordered(tasks)
    if jobs == 1:
        for name in waiting:
            tasks[name].run(*tasks[name].arguments, device)
        return
    spawned = multiprocessing.get_context("spawn")
    running: dict[Future, str] = {}
    done: set[str] = set()
    with ProcessPoolExecutor(jobs, mp_context=spawned, initializer=_start_worker) as pool:
        while waiting or running:
            for name in [n for n in waiting if tasks[n].needs <= done]:
                waiting.remove(name)
                running[pool.submit(tasks[name].run, *tasks[name].arguments, device)] = name
            finished: Iterable[Future] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
                done.add(running.pop(future))


def _start_worker() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def ordered(tasks: Mapping[str, Task]) -> list[str]:
    """Names of all tasks, each after those it needs."""
    done: dict[str, None] = {}
    while len(done) < len(tasks):
        ready = [name for name, task in tasks.items() if name not in done and task.needs <= done.keys()]
        if not ready:
            raise UserError(f"got trainings that wait for each other: {', '.join(sorted(tasks.keys() - done.keys()))}")
        done |= dict.fromkeys(ready)
    return list(done)


def train_stage(stage: StageConfig, name: str, device: str, log: Log = print) -> None:
    """Train, or go on, with the name before every line."""
    torch.set_flush_denormal(True)  # denormal numbers make CPU training many times slower
    stage.run(lambda line: log(f"{name}: {line}"), torch.device(device))


def training_facts(stage: Any, device: str) -> dict[str, Any]:
    """What a table of trainings says of one that is done."""
    loop, last = stage.loop, (Path(stage.output_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return {
        "stage": stage.name,
        "steps": loop.steps,
        "samples": loop.steps * loop.batch_size * loop.micro_batches,
        "minutes": round(loop.steps / json.loads(last)["steps_per_s"] / 60, 1),
        "device": device_name(device),
    }


def once(path: Path, made: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The result in a file, made where it is not there yet.

    Args:
        path: of the file.
        made: all that the result depends on.
        make: gives it.

    Raises:
        UserError: the file is the result of something else, or damaged.
    """
    if (result := read_result(path, made)) is None:
        result = dict(make())
        write_result(path, made, result)
    return result
