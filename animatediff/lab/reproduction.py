"""The paper's claims in the built-in world: trainings that build on each other, and tables of what they can do."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animatediff.config.dataclass_io import build_dataclass, read_yaml
from animatediff.config.prompt_yaml import load_config
from animatediff.config.request import Request
from animatediff.lab.ablation import Grid, load_grid, merged, run_grid
from animatediff.lab.results import (
    device_name,
    keeping_strip,
    markdown,
    read_result,
    spread,
    stack_strips,
    write_result,
)
from animatediff.lab.run_model import clip_maker, controlled_clip_maker
from animatediff.lab.stages import build_stage
from animatediff.lab.zero_shot import MOTION, text2video_zero
from animatediff.pipeline.device import pick_device
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.training.sources import existing
from animatediff.training.stages import Training
from animatediff.utils import UserError, naming
from animatediff.world.evaluate import Generate, evaluate_shapes
from animatediff.world.series import World
from animatediff.world.shapes import MOTIONS

Log = Callable[[str], None]
# The paper's levels are for 64x64 latents; in 16x16 as much can be seen with a quarter of the noise's deviation.
ZERO_SHOT = {"levels": (636, 546), "motion": (MOTION, 0.0)}  # to the right
REFERENCE = re.compile(r"<(.+?)>")  # in a value: the folder of a training


@dataclass(frozen=True)
class Recipe:
    """A training: a YAML of configs/train, and values that differ, nested as they are there."""

    train: str
    changes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A number of `evaluate_shapes` over captions of some motions, by default the ten that shapes have."""

    measure: str  # a key of the summary; of a key within it, `amplitudes.orbit`
    motions: tuple[str, ...] = tuple(MOTIONS)
    digits: int | None = None  # after the point; by default 1 of percentages, 2 of others


@dataclass(frozen=True)
class Row:
    """A model to measure."""

    animate: dict = field(default_factory=dict)  # keys of the prompt config that differ
    style: str = "plain"  # that it paints in
    zero_shot: bool = False  # animated by Text2Video-Zero
    given: tuple[int, ...] = ()  # frames of the rendered scene that its SparseCtrl encoder is shown


@dataclass(frozen=True)
class Table:
    """Rows of models and columns of numbers; or, with `grid`, cells of an ablation.

    Raises:
        UserError: rows or columns are missing, or too much is there.
    """

    title: str
    columns: dict[str, Column] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    shown: int = 3  # number of the first column's caption whose clips are the table's strips, or the last
    grid: str = ""  # a YAML of scripts/ablate.py
    cells: tuple[str, ...] = ()  # of the grid; by default all

    def __post_init__(self) -> None:
        if bool(self.grid) == bool(self.rows) or bool(self.rows) != bool(self.columns):
            raise UserError(f"{self.title}: expected either rows and columns, or a grid")


@dataclass(frozen=True)
class Reproduction:
    """What to train and to measure. In every value `<name>` is the folder of the training `name`.

    Raises:
        UserError: no table, no seed or no caption, or a folder of a training that is not there.
    """

    output_dir: str
    animate: str  # the prompt config that rows differ from
    tables: dict[str, Table]
    trainings: dict[str, Recipe] = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)  # keys of the prompt config for all rows
    seeds: tuple[int, ...] = (1, 2, 3)  # of the series of captions that are scored; trainings draw from series 0
    captions: int = 50  # of each series
    quick: dict = field(default_factory=dict)  # with --quick: values of all these that differ

    def __post_init__(self) -> None:
        if not self.tables or not self.seeds or self.captions < 1:
            raise UserError("expected at least one table, one seed and one caption")
        for values in (*self.trainings.values(), *(row for t in self.tables.values() for row in t.rows.values())):
            if unknown := references(values) - self.trainings.keys():
                raise UserError(f"got <{min(unknown)}>, expected trainings: {', '.join(self.trainings)}")

    def folder(self, training: str) -> Path:
        return Path(self.output_dir) / training

    def resolved(self, values: Any) -> Any:
        """Mappings, lists and texts with the folders of trainings in place of their names."""
        if isinstance(values, Mapping):
            return {key: self.resolved(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.resolved(value) for value in values]
        return REFERENCE.sub(lambda m: self.folder(m[1]).as_posix(), values) if isinstance(values, str) else values

    def stage(self, training: str) -> Training:
        """Raises: UserError for values that the training does not have."""
        recipe = self.trainings[training]
        own = {"output_dir": self.folder(training).as_posix()}
        values = merged(read_yaml(existing(recipe.train)), self.resolved(recipe.changes), own)
        with naming(f"training {training!r}"):
            return build_stage(values, where=recipe.train)

    def entry(self, row: Row) -> Request:
        return load_config(existing(self.animate), self.overrides(row)).entries[0]

    def overrides(self, row: Row) -> dict[str, Any]:
        return merged(self.sampling, self.resolved(row.animate))


def load_reproduction(path: str | Path, *, quick: bool = False, tables: Sequence[str] = ()) -> Reproduction:
    """Read the YAML; `tables` are those to make, by default all.

    Raises:
        UserError: an unknown key or table, or a missing or mistyped value.
    """
    values = read_yaml(path)
    plan = build_dataclass(Reproduction, values, where=str(path))
    if quick:
        plan = build_dataclass(Reproduction, merged(values, plan.quick), where=f"{path}: quick")
    if unknown := sorted(set(tables) - plan.tables.keys()):
        raise UserError(f"got table {unknown[0]!r}, expected some of {', '.join(plan.tables)}")
    return replace(plan, tables={name: plan.tables[name] for name in tables}) if tables else plan


def references(values: Any) -> set[str]:
    """Names of the trainings whose folders a recipe or a row needs."""
    return set(REFERENCE.findall(repr(values)))


# ---- what there is to do


@dataclass(frozen=True)
class Task:
    """A training, or a row measured on the captions of one seed and some motions."""

    run: Callable[..., None]
    arguments: tuple
    needs: frozenset[str]  # trainings that come before


def plan_tasks(plan: Reproduction) -> dict[str, Task]:
    """All that the tables need, by name: trainings under their own, then the cells, under their folders."""
    cells: dict[str, Task] = {}
    for name, table in plan.tables.items():
        for row_name, row in table.rows.items():
            for motions in dict.fromkeys(column.motions for column in table.columns.values()):
                for seed in plan.seeds:
                    task = Task(run_cell, (plan, name, row_name, motions, seed), frozenset(references(row)))
                    cells[cell_folder(plan, name, row_name, motions, seed).as_posix()] = task
    trainings: dict[str, Task] = {}
    wanted = [need for task in cells.values() for need in task.needs]
    while wanted:
        if (name := wanted.pop()) not in trainings:
            trainings[name] = Task(run_training, (plan, name), frozenset(references(plan.trainings[name])))
            wanted += trainings[name].needs
    return {name: trainings[name] for name in plan.trainings if name in trainings} | cells


def run_reproduction(plan: Reproduction, *, jobs: int = 1, device: str = "auto", quick: bool = False) -> str:
    """Train and measure what is missing; writes `output_dir`/tables.md with a strip of frames for each table.

    Args:
        plan: what to do; what is done already is taken from its folder.
        jobs: processes at a time, each on one CPU core.
        device: auto, cuda, mps or cpu.
        quick: also of the grids.

    Returns:
        The tables, in Markdown.

    Raises:
        UserError: something cannot be trained or measured, or a folder holds the result of another recipe.
    """
    target = str(pick_device(device))
    for training in plan.trainings:
        plan.stage(training)  # mistakes are told before anything starts
    for table in plan.tables.values():
        for row in table.rows.values():
            plan.entry(row)
    grids = {name: grid_of(table, quick) for name, table in plan.tables.items() if table.grid}
    tasks = plan_tasks(plan)
    if jobs == 1:
        for name in ordered(tasks):
            tasks[name].run(*tasks[name].arguments, target)
    else:
        _run_parallel(tasks, jobs, target)
    parts = []
    for name, table in plan.tables.items():
        if table.grid:
            run_grid(grids[name], jobs=jobs, device=target)
            text = (Path(grids[name].output_dir) / "table.md").read_text(encoding="utf-8")
        else:
            text = table_text(plan, name)
        parts.append(f"## {table.title}\n\n{text.strip()}\n")
    text = "\n".join([*parts, trainings_text(plan, tasks)])
    (Path(plan.output_dir) / "tables.md").write_text(text, encoding="utf-8")
    return text


def grid_of(table: Table, quick: bool) -> Grid:
    """The grid of a table, with the cells that it wants."""
    grid = load_grid(existing(table.grid), quick=quick)
    if unknown := sorted(set(table.cells) - grid.cells.keys()):
        raise UserError(f"{table.title}: got cell {unknown[0]!r}, expected some of {', '.join(grid.cells)}")
    return replace(grid, cells={name: grid.cells[name] for name in table.cells}) if table.cells else grid


def ordered(tasks: Mapping[str, Task]) -> list[str]:
    """Names of all tasks, each after those it needs."""
    done: dict[str, None] = {}
    while len(done) < len(tasks):
        ready = [name for name, task in tasks.items() if name not in done and task.needs <= done.keys()]
        if not ready:
            raise UserError(f"got trainings that wait for each other: {', '.join(sorted(tasks.keys() - done.keys()))}")
        done |= dict.fromkeys(ready)
    return list(done)


def _run_parallel(tasks: Mapping[str, Task], jobs: int, device: str) -> None:
    spawned = multiprocessing.get_context("spawn")
    waiting, running, done = ordered(tasks), {}, set()
    with ProcessPoolExecutor(jobs, mp_context=spawned, initializer=torch.set_num_threads, initargs=(1,)) as pool:
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


def run_training(plan: Reproduction, name: str, device: str = "cpu", log: Log = print) -> None:
    """Train, or go on; done where `made.json` is there."""
    stage = plan.stage(name)
    path, made = plan.folder(name) / "made.json", repr(stage)
    if read_result(path, made) is None:
        torch.set_flush_denormal(True)
        stage.run(lambda line: log(f"{name}: {line}"), torch.device(device))
        loop, last = stage.loop, (path.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        facts = {
            "stage": stage.name,
            "steps": loop.steps,
            "samples": loop.steps * loop.batch_size * loop.micro_batches,
            "minutes": round(loop.steps / json.loads(last)["steps_per_s"] / 60, 1),
            "device": device_name(device),
        }
        write_result(path, made, facts)


def cell_folder(plan: Reproduction, table: str, row: str, motions: Sequence[str], seed: int) -> Path:
    which = "shapes" if tuple(motions) == tuple(MOTIONS) else "-".join(motions)
    return Path(plan.output_dir) / "tables" / table / row / f"{which}-{seed}"


def run_cell(
    plan: Reproduction, table: str, row: str, motions: tuple[str, ...], seed: int, device: str = "cpu"
) -> None:
    """Measure one model; done where `result.json` is there."""
    what = plan.tables[table].rows[row]
    folder = cell_folder(plan, table, row, motions, seed)
    path, made = folder / "result.json", repr((what, plan.overrides(what), plan.captions, motions, seed))
    if read_result(path, made) is None:
        world = World(plan.captions, what.style, motions=motions, seed=seed)
        shown = min(plan.tables[table].shown, plan.captions - 1)
        generate = keeping_strip(make_generator(plan, what, world, device), folder, shown)
        found = evaluate_shapes(generate, captions=plan.captions, seed=seed, style=what.style, motions=motions)
        write_result(path, made, {"device": device_name(device), **found["generated"]})


def make_generator(plan: Reproduction, row: Row, world: World, device: str) -> Generate:
    entry = plan.entry(row)
    pipeline = AnimateDiffPipeline.from_config(existing(plan.animate), device=device, **plan.overrides(row))
    if row.given:
        return controlled_clip_maker(pipeline, entry, world, row.given)
    if not row.zero_shot:
        return clip_maker(pipeline, entry)

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        steps, scale = entry.sampling.steps, entry.sampling.guidance_scale
        return text2video_zero(
            pipeline, captions, seeds, frames=entry.size.num_frames, steps=steps, guidance_scale=scale, **ZERO_SHOT
        )

    return generate


# ---- what was found


def table_text(plan: Reproduction, name: str) -> str:
    """A table in Markdown, with what was measured below; its strips go into `output_dir`/<name>.png."""
    table, lines, devices = plan.tables[name], [], set()
    for row in table.rows:
        cells = [row]
        for title, column in table.columns.items():
            folders = [cell_folder(plan, name, row, column.motions, seed) for seed in plan.seeds]
            results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders]
            devices |= {result["device"] for result in results}
            digits = (1 if "%" in title else 2) if column.digits is None else column.digits
            cells.append(spread([lookup(result, column.measure) for result in results], digits))
        lines.append(cells)
    text = markdown(["", *table.columns], lines)
    first = next(iter(table.columns.values())).motions
    strips = {row: cell_folder(plan, name, row, first, plan.seeds[0]) for row in table.rows}
    if stack_strips(strips, Path(plan.output_dir) / f"{name}.png"):
        text += f"\n\n![a clip of each row, frame by frame]({name}.png)"
    s, where = plan.entry(Row()).sampling, "; ".join(sorted(devices))
    return (
        f"{text}\n\nMean ± standard deviation over {len(plan.seeds)} series of {plan.captions} held-out captions; "
        f"{s.sampler or 'ddim'}, {s.steps} steps, guidance {s.guidance_scale:g}; {where}."
    )


def trainings_text(plan: Reproduction, tasks: Iterable[str]) -> str:
    """What was trained, for how long, where."""
    facts = {
        name: json.loads((plan.folder(name) / "made.json").read_text(encoding="utf-8"))
        for name in plan.trainings
        if name in set(tasks)
    }
    if not facts:
        return ""
    keys = ("stage", "steps", "samples", "minutes", "device")
    return (
        "## Trainings\n\n"
        + markdown(["", *keys], [[n, *(str(f[key]) for key in keys)] for n, f in facts.items()])
        + "\n"
    )


def lookup(result: Mapping[str, Any], measure: str) -> float | None:
    """A number of a summary; keys within keys are joined by dots."""
    value: Any = result
    for key in measure.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise UserError(f"got the measure {measure!r}, expected a number of the summary, such as motion")
        value = value[key]
    return value
