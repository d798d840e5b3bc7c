"""The paper's claims on Shapes, the toy data set: trainings that build on each other, and tables of what they do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from animatediff.config.prompt_yaml import load_config
from animatediff.config.request import Request
from animatediff.config.settings import Int, Many, build, opt, options, read_yaml
from animatediff.lab.ablation import Grid, grid_tasks, load_grid, merged, write_grid_table
from animatediff.lab.cells import Task, once, run_tasks, train_stage, training_facts
from animatediff.lab.results import device_name, keeping_strip, markdown, spread, stack_strips, write_text
from animatediff.lab.run_model import clip_maker, controlled_clip_maker
from animatediff.lab.stage_table import build_stage, expanded
from animatediff.lab.zero_shot import MOTION, text2video_zero
from animatediff.metrics.tables import write_csv
from animatediff.pipeline.device import pick_device
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.training.sources import resolve_path
from animatediff.training.stages import Training
from animatediff.utils import UserError, naming
from animatediff.world.evaluate import Generate, evaluate_shapes
from animatediff.world.series import World
from animatediff.world.shapes import MOTIONS

# The paper's levels are for 64x64 latents; in 16x16 as much can be seen with a quarter of the noise's deviation.
ZERO_SHOT = {"levels": (636, 546), "motion": (MOTION, 0.0)}  # to the right
REFERENCE = re.compile(r"<(.+?)>")  # in a value: the folder of a training


@options
class Recipe:
    """A training: a YAML of configs/train, and values that differ, nested as they are there."""

    train: str = opt(..., "the YAML")
    changes: dict[str, Any] = opt({}, "the values")


@options
class Column:
    """A number of `evaluate_shapes` over captions of some motions, by default the ten that shapes have."""

    measure: str = opt(..., "a key of the summary; of a key within it, `amplitudes.orbit`")
    motions: Many[str] = opt(tuple(MOTIONS), "of the captions")
    digits: Int | None = opt(None, "after the point; by default 1 of percentages, 2 of others")


@options
class Row:
    """A model to measure."""

    animate: dict[str, Any] = opt({}, "keys of the prompt config that differ")
    style: str = opt("plain", "that it paints in")
    zero_shot: bool = opt(False, "animated by Text2Video-Zero")
    given: Many[Int] = opt((), "frames of the rendered scene that its SparseCtrl encoder is shown")


@options
class Table:
    """Rows of models and columns of numbers; or, with `grid`, cells of an ablation."""

    title: str = opt(..., "of the table")
    columns: dict[str, Column] = opt({}, "by their titles")
    rows: dict[str, Row] = opt({}, "by their titles")
    summary: Many[str] = opt((), "rows, or cells of the grid, that tables.md shows, by default all; a CSV has all")
    shown: Int = opt(3, "number of the first column's caption whose clips are the table's strips, or the last", ge=0)
    grid: str = opt("", "a YAML of scripts/ablate.py")

    def __post_init__(self) -> None:
        if bool(self.grid) == bool(self.rows) or bool(self.rows) != bool(self.columns):
            raise UserError(f"{self.title}: expected either rows and columns, or a grid")
        if self.rows:
            self.check_summary(self.rows)

    def check_summary(self, rows: Mapping[str, Any]) -> None:
        """Raises: UserError where `summary` names another one than these."""
        if unknown := sorted(set(self.summary) - rows.keys()):
            raise UserError(f"{self.title}: summary: got {unknown[0]!r}, expected some of {', '.join(rows)}")


@options
class Reproduction:
    """What to train and to measure. In every value `<name>` is the folder of the training `name`."""

    output_dir: str = opt(..., "gets a folder for every training, and the tables")
    animate: str = opt(..., "the prompt config that rows differ from")
    tables: dict[str, Table] = opt(..., "by their names")
    trainings: dict[str, Recipe] = opt({}, "by their names")
    sampling: dict[str, Any] = opt({}, "keys of the prompt config for all rows")
    seeds: Many[Int] = opt((1, 2, 3), "of the series of captions that are scored; trainings draw from series 0")
    captions: Int = opt(50, "of each series")
    quick: dict[str, Any] = opt({}, "with --quick: values of all these that differ; null for a row that is left out")

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
        values = merged(read_yaml(resolve_path(recipe.train)), self.resolved(recipe.changes), own)
        with naming(f"training {training!r}"):
            return build_stage(values, where=recipe.train)

    def entry(self, row: Row) -> Request:
        return load_config(resolve_path(self.animate), self.overrides(row)).entries[0]

    def overrides(self, row: Row) -> dict[str, Any]:
        return merged(self.sampling, self.resolved(row.animate))


def load_reproduction(path: str | Path, *, quick: bool = False, tables: Sequence[str] = ()) -> Reproduction:
    """Read the YAML; `tables` are those to make, by default all.

    Raises:
        UserError: an unknown key or table, or a missing or mistyped value.
    """
    values = read_yaml(path)
    plan = build(Reproduction, expanded(values, Reproduction), where=str(path))
    if quick:
        values = merged(values, plan.quick)
        for table in values["tables"].values():
            table["rows"] = {name: row for name, row in table.get("rows", {}).items() if row is not None}
        plan = build(Reproduction, expanded(values, Reproduction), where=f"{path}: quick")
    if unknown := sorted(set(tables) - plan.tables.keys()):
        raise UserError(f"got table {unknown[0]!r}, expected some of {', '.join(plan.tables)}")
    return replace(plan, tables={name: plan.tables[name] for name in tables}) if tables else plan


def references(values: Any) -> set[str]:
    """Names of the trainings whose folders a recipe or a row needs."""
    return set(REFERENCE.findall(repr(values)))


# ---- what there is to do


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
    """Train and measure what is missing; writes `output_dir`/tables.md with a strip of frames for each table, and
    tables.csv, which has every row. Grids have folders of their own.

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
    for training in plan.trainings:
        plan.stage(training)  # mistakes are told before anything starts
    for table in plan.tables.values():
        for row in table.rows.values():
            plan.entry(row)
    grids = {name: grid_of(table, quick) for name, table in plan.tables.items() if table.grid}
    tasks = plan_tasks(plan)
    of_grids = {name: task for grid in grids.values() for name, task in grid_tasks(grid).items()}
    run_tasks(tasks | of_grids, jobs=jobs, device=str(pick_device(device)))
    parts, measured = [], []
    for name, table in plan.tables.items():
        if table.grid:
            write_grid_table(grids[name], table.summary)
            text = (Path(grids[name].output_dir) / "table.md").read_text(encoding="utf-8")
        else:
            rows = table_rows(plan, name)
            measured += rows
            text = table_text(plan, name, rows)
        parts.append(f"## {table.title}\n\n{text.strip()}\n")
    text = "\n".join([*parts, trainings_text(plan, tasks)])
    write_text(Path(plan.output_dir) / "tables.md", text)
    if measured:
        write_csv(Path(plan.output_dir) / "tables.csv", measured)
    return text


def grid_of(table: Table, quick: bool) -> Grid:
    """The grid of a table."""
    grid = load_grid(resolve_path(table.grid), quick=quick)
    table.check_summary(grid.cells)
    return grid


def run_training(plan: Reproduction, name: str, device: str = "cpu") -> None:
    """Train, or go on; done where `made.json` is there."""
    stage = plan.stage(name)

    def make() -> dict[str, Any]:
        train_stage(stage, name, device)
        return training_facts(stage, device)

    once(plan.folder(name) / "made.json", repr(stage), make)


def cell_folder(plan: Reproduction, table: str, row: str, motions: Sequence[str], seed: int) -> Path:
    which = "shapes" if tuple(motions) == tuple(MOTIONS) else "-".join(motions)
    return Path(plan.output_dir) / "tables" / table / row / f"{which}-{seed}"


def run_cell(
    plan: Reproduction, table: str, row: str, motions: tuple[str, ...], seed: int, device: str = "cpu"
) -> None:
    """Measure one model; done where `result.json` is there."""
    what = plan.tables[table].rows[row]
    folder = cell_folder(plan, table, row, motions, seed)

    def make() -> dict[str, Any]:
        world = World(plan.captions, what.style, motions=motions, seed=seed)
        shown = min(plan.tables[table].shown, plan.captions - 1)
        generate = keeping_strip(make_generator(plan, what, world, device), folder, shown)
        found = evaluate_shapes(generate, captions=plan.captions, seed=seed, style=what.style, motions=motions)
        return {"device": device_name(device), **found["generated"]}

    once(folder / "result.json", repr((what, plan.overrides(what), plan.captions, motions, seed)), make)


def make_generator(plan: Reproduction, row: Row, world: World, device: str) -> Generate:
    entry = plan.entry(row)
    pipeline = AnimateDiffPipeline.from_config(resolve_path(plan.animate), device=device, **plan.overrides(row))
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


def table_rows(plan: Reproduction, name: str) -> list[dict[str, str]]:
    """All numbers of a table, one to a dict, as tables.csv has them."""
    table, rows = plan.tables[name], []
    for row in table.rows:
        for title, column in table.columns.items():
            folders = [cell_folder(plan, name, row, column.motions, seed) for seed in plan.seeds]
            results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders]
            digits = (1 if "%" in title else 2) if column.digits is None else column.digits
            number = spread([lookup(result, column.measure) for result in results], digits)
            device = "; ".join(sorted({result["device"] for result in results}))
            rows.append({"table": name, "row": row, "column": title, "number": number, "device": device})
    return rows


def table_text(plan: Reproduction, name: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown, with what was measured below; its strips go into `output_dir`/<name>.png."""
    table = plan.tables[name]
    shown = table.summary or tuple(table.rows)
    lines = [[row, *(found["number"] for found in rows if found["row"] == row)] for row in shown]
    text = markdown(["", *table.columns], lines)
    first = next(iter(table.columns.values())).motions
    strips = {row: cell_folder(plan, name, row, first, plan.seeds[0]) for row in shown}
    if stack_strips(strips, Path(plan.output_dir) / f"{name}.png"):
        text += f"\n\n![a clip of each row, frame by frame]({name}.png)"
    s, where = plan.entry(Row()).sampling, "; ".join(sorted({found["device"] for found in rows}))
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
