"""A grid of trainings on Shapes, the toy data set, that differ in a few values, and a table of what each can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from animatediff.config.prompt_yaml import load_config
from animatediff.config.settings import Int, Many, build, opt, options, read_yaml
from animatediff.lab.cells import Task, once, run_tasks, train_stage
from animatediff.lab.results import device_name, keeping_strip, markdown, spread, stack_strips, write_text
from animatediff.lab.run_model import clip_maker
from animatediff.lab.stage_table import build_stage
from animatediff.metrics.tables import align, write_csv
from animatediff.pipeline.device import pick_device
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.training.sources import resolve_path
from animatediff.training.stages import MotionModule
from animatediff.utils import UserError, naming
from animatediff.world.evaluate import evaluate_shapes
from animatediff.world.shapes import MOTIONS

SHOWN = 3  # number of the caption whose clips are in strips.png, or the last
MEASURES = {
    "motion": "motion %",
    "place": "place %",
    "amplitude": "",
    "shape": "shape %",
    "all": "all %",
    "smoothness": "",
    "flicker": "",
    "drift": "",
}


@options
class Grid:
    """Which trainings to compare."""

    output_dir: str = opt(..., "gets a folder for every training, and the table")
    train: str = opt(..., "the training YAML of every cell, a stage motion_module on Shapes")
    animate: str = opt(..., "the prompt config whose sampling the clips are made with")
    cells: dict[str, dict[str, Any] | None] = opt(..., "name -> values that differ from it, nested as they are there")
    common: dict[str, Any] = opt({}, "values that differ from it in every cell")
    quick: dict[str, Any] = opt(
        {}, "with --quick: fields of this grid; `common` and `cells` are added to those above, cells of null left out"
    )
    sampling: dict[str, Any] = opt({}, "keys of the prompt config that differ in every cell")
    seeds: Many[Int] = opt((0, 1, 2), "of the trainings of each cell")
    captions: Int = opt(100, "clips that are scored")

    def __post_init__(self) -> None:
        if not self.cells or not self.seeds or self.captions < 1:
            raise UserError(
                f"got {len(self.cells)} cells, {len(self.seeds)} seeds and {self.captions} captions, "
                "expected at least one of each"
            )

    def stage(self, cell: str, seed: int) -> MotionModule:
        """The training of one cell.

        Raises:
            UserError: a value that the training does not have, or another stage.
        """
        folder = Path(self.output_dir) / cell / str(seed)
        own = {"output_dir": str(folder), "seed": seed, "loop": {"seed": seed}}
        values = merged(read_yaml(resolve_path(self.train)), self.common, self.cells[cell] or {}, own)
        with naming(f"cell {cell!r}"):
            stage = build_stage(values, where=self.train)
            if not isinstance(stage, MotionModule) or stage.world is None:
                raise UserError("got another stage, expected motion_module on Shapes, the toy data set")
        return stage


def load_grid(path: str | Path, *, quick: bool = False) -> Grid:
    """Read a grid's YAML. Raises: UserError for an unknown key, or a missing or mistyped value."""
    values = read_yaml(path)
    grid = build(Grid, values, where=str(path))
    if quick:
        left_out = {cell for cell, changes in grid.quick.get("cells", {}).items() if changes is None}
        values = merged(values, grid.quick)
        values["cells"] = {cell: changes for cell, changes in values["cells"].items() if cell not in left_out}
        grid = build(Grid, values, where=f"{path}: quick")
    return grid


def merged(*mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Later values win; mappings within mappings are merged alike."""
    result: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def run_grid(grid: Grid, *, jobs: int = 1, device: str = "cpu") -> str:
    """Train and measure what is missing; writes table.md, table.csv and strips.png into `output_dir`.

    Args:
        grid: what to compare.
        jobs: processes that each work on a cell, on one CPU core, at a time.
        device: auto, cuda, mps or cpu.

    Returns:
        The table, as text.

    Raises:
        UserError: a cell cannot be trained, or its folder holds the result of another one.
    """
    run_tasks(grid_tasks(grid), jobs=jobs, device=str(pick_device(device)))
    return write_grid_table(grid)


def grid_tasks(grid: Grid) -> dict[str, Task]:
    """A task for every cell and seed, by its folder. Raises: UserError for mistakes, before anything starts."""
    pairs = [(cell, seed) for cell in grid.cells for seed in grid.seeds]
    return {grid.stage(*pair).output_dir: Task(run_cell, (grid, *pair)) for pair in pairs}


def write_grid_table(grid: Grid, shown: Sequence[str] = ()) -> str:
    """The table of results that are all there, as text; also as table.md, table.csv and strips.png.

    `shown`: the cells of all but table.csv, which has all; by default all.
    """
    found = {cell: [run_cell(grid, cell, seed) for seed in grid.seeds] for cell in grid.cells}
    rows = [table_row(cell, results) for cell, results in found.items()]
    stage = grid.stage(next(iter(grid.cells)), grid.seeds[0])
    loop, world = stage.loop, stage.world
    assert world is not None
    seen = loop.steps * loop.batch_size * loop.micro_batches
    sampling = load_config(resolve_path(grid.animate), grid.sampling).entries[0].sampling
    devices = {result["device"] for results in found.values() for result in results}
    caption = (
        f"{loop.steps} steps, {seen} clips seen, of {world.clips} that show {', '.join(world.motions or MOTIONS)}; "
        f"{grid.captions} captions, {sampling.sampler or 'ddim'}, {sampling.steps} steps; mean ± standard deviation "
        f"over the trainings of each ({len(grid.seeds)}); {', '.join(sorted(devices))}"
    )
    header = ["", *(title or name for name, title in MEASURES.items())]
    by_cell = {row["cell"]: [row["cell"], *(row[name] for name in MEASURES)] for row in rows}
    lines = [by_cell[cell] for cell in shown or grid.cells]
    folder = Path(grid.output_dir)
    write_text(folder / "table.md", f"{markdown(header, lines)}\n\n{caption}\n")
    write_csv(folder / "table.csv", rows)
    stack_strips({cell: folder / cell / str(grid.seeds[0]) for cell in shown or grid.cells}, folder / "strips.png")
    return f"{align([header, *lines])}\n{caption}"


def run_cell(grid: Grid, cell: str, seed: int, device: str = "cpu") -> dict[str, Any]:
    """What one training scores; read from its folder where it is done."""
    stage = grid.stage(cell, seed)

    def make() -> dict[str, Any]:
        train_stage(stage, f"{cell}, seed {seed}", device)
        return {**measure(grid, stage, device), "device": device_name(device)}

    return once(Path(stage.output_dir) / "result.json", repr((stage, grid.captions, grid.sampling)), make)


def measure(grid: Grid, stage: MotionModule, device: str) -> dict[str, Any]:
    """Scores of held-out captions, animated by what a stage has written, with its own noise schedule."""
    config, folder = resolve_path(grid.animate), Path(stage.output_dir)
    overrides = grid.sampling | {
        "pretrained_model_path": stage.pretrained_model_path,
        "motion_module": str(folder / "motion.safetensors"),
    }
    pipeline = AnimateDiffPipeline.from_config(config, device=device, **overrides)
    parts = pipeline.model
    parts.schedule = replace(parts.schedule, beta_schedule=stage.beta_schedule)
    make = clip_maker(pipeline, load_config(config, overrides).entries[0])
    generate = keeping_strip(make, folder, min(SHOWN, grid.captions - 1))
    assert stage.world is not None
    motions = stage.world.motions or tuple(MOTIONS)
    result = evaluate_shapes(generate, captions=grid.captions, style=stage.world.style, motions=motions)
    return result["generated"]


def table_row(cell: str, results: list[dict[str, Any]]) -> dict[str, str]:
    """Mean ± deviation of every measure over a cell's seeds."""
    digits = {name: 1 if title else 3 for name, title in MEASURES.items()}
    numbers = [result | {"amplitude": amplitude(result)} for result in results]
    return {"cell": cell} | {name: spread([found[name] for found in numbers], digits[name]) for name in MEASURES}


def amplitude(result: dict[str, Any]) -> float | None:
    """How far the clips do what they are asked for, over the true amount; negative the other way.

    It tells trainings apart that are too short for any motion to be right.
    """
    found = [m for m in result["by_motion"].values() if m["amplitude"] is not None]
    return sum(m["clips"] * m["amplitude"] for m in found) / sum(m["clips"] for m in found) if found else None
