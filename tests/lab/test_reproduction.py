"""Trainings that build on each other and a table of what they do, on networks of a few thousand weights."""

import csv
import itertools
import json
import re

import pytest
from PIL import Image

from animatediff.lab import reproduction
from animatediff.lab.cells import ordered
from animatediff.lab.reproduction import Reproduction, load_reproduction, lookup, plan_tasks
from animatediff.lab.results import spread
from animatediff.utils import UserError
from scripts import reproduce
from tests.training.test_stages import LOOP, MOTION, write
from tests.training.test_stages import trained as trained

IMAGE_MODEL = "pretrained_model_path"


@pytest.fixture
def plan_values(trained, tmp_path) -> dict:
    model = str(trained / "image/image.safetensors")
    styled = {"stage": "image_finetune", IMAGE_MODEL: model, "world": {"clips": 2, "style": "neon"}, "loop": LOOP}
    animate = {IMAGE_MODEL: model, "prompt": "a", "steps": 2, "guidance_scale": 1.0, "H": 64, "W": 64}
    moved = MOTION | {IMAGE_MODEL: "unused", "output_dir": "unused"}
    moves = {IMAGE_MODEL: "<styled>/image.safetensors", "motion_module": "<moved>/motion.safetensors"}
    return {
        "output_dir": str(tmp_path / "out"),
        "animate": str(write(tmp_path / "animate.yaml", animate)),
        "sampling": {"steps": 1},
        "seeds": [1, 2],
        "captions": 2,
        "trainings": {
            "moved": {
                "train": str(write(tmp_path / "moved.yaml", moved)),
                "changes": {IMAGE_MODEL: "<styled>/image.safetensors", "loop": {"steps": 1}},
            },
            "styled": {"train": str(write(tmp_path / "styled.yaml", styled | {"output_dir": "unused"}))},
            "needless": {"train": str(tmp_path / "styled.yaml")},
        },
        "tables": {
            "first": {
                "title": "A claim",
                "columns": {
                    "motion %": "motion",
                    "zoom": {"measure": "amplitudes.zoom_in", "motions": ["zoom_in", "left"]},
                },
                "rows": {
                    "as it is": {},
                    "moving": {"animate": moves, "style": "neon"},
                    "zero-shot": {"animate": {IMAGE_MODEL: "<styled>/image.safetensors"}, "zero_shot": True},
                    "left out": {"style": "hatched"},
                },
                "summary": ["moving", "as it is"],
            }
        },
        "quick": {
            "seeds": [5],
            "trainings": {"styled": {"changes": {"loop": {"steps": 1}}}},
            "tables": {"first": {"rows": {"left out": None}}},
        },
    }


@pytest.mark.slow
def test_a_table(plan_values, tmp_path, capsys, monkeypatch):
    config = str(write(tmp_path / "plan.yaml", plan_values))
    reproduce.main(["--config", config, "--quick", "--device", "cpu"])
    said = capsys.readouterr().out
    out = tmp_path / "out"
    text = (out / "tables.md").read_text()
    assert text.strip() in said
    assert "1 series of 2 held-out captions; ddim, 1 steps, guidance 1; cpu" in text
    assert re.search(r"^\| moving \| \d+\.\d \| -?\d+\.\d\d \|$", text, re.M)
    assert re.search(r"^\| styled \| image_finetune \| 1 \| 2 \|", text, re.M) and "needless" not in text
    strip = Image.open(out / "first.png")
    assert strip.width >= 16 * 64 and 2 * 64 <= strip.height < 3 * 64
    assert "zero-shot" not in text and text.index("| moving |") < text.index("| as it is |")
    with (out / "tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["column"]) for row in rows] == list(
        itertools.product(["as it is", "moving", "zero-shot"], ["motion %", "zoom"])
    )
    assert all(f"| {row['number']} |" in text for row in rows if row["row"] == "moving")
    monkeypatch.setattr(reproduction, "evaluate_shapes", lambda *rest, **more: pytest.fail("done already"))
    reproduce.main(["--config", config, "--quick", "--device", "cpu"])
    assert (out / "tables.md").read_text() == text
    made = out / "styled/made.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"made": "otherwise"}))
    with pytest.raises(UserError, match="of other values than the config's"):
        reproduce.main(["--config", config, "--quick", "--device", "cpu"])


@pytest.mark.slow
def test_every_task_comes_after_what_it_needs(plan_values, tmp_path):
    plan = load_reproduction(write(tmp_path / "plan.yaml", plan_values))
    names = ordered(plan_tasks(plan))
    assert names.index("styled") < names.index("moved") < names.index(f"{plan.output_dir}/tables/first/moving/shapes-1")
    assert len(names) == 2 + 4 * 2 * 2  # trainings; rows, kinds of captions, seeds
    circle = plan_values["trainings"] | {"styled": {"train": "x", "changes": {IMAGE_MODEL: "<moved>/x"}}}
    plan = load_reproduction(write(tmp_path / "plan.yaml", plan_values | {"trainings": circle}))
    with pytest.raises(UserError, match="wait for each other: moved, styled"):
        ordered({name: task for name, task in plan_tasks(plan).items() if "/" not in name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": {}}, "at least one table"),
        ({"tables": {"a": {"title": "A"}}}, "A: expected either rows and columns, or a grid"),
        (
            {"tables": {"a": {"title": "A", "columns": {"m": "motion"}, "rows": {"b": {}}, "summary": ["c"]}}},
            "A: summary: got 'c', expected some of b",
        ),
        ({"trainings": {"moved": {"train": "a.yaml", "changes": {"a": "<nobody>/b"}}}}, "got <nobody>, expected"),
        ({"sampling": {"stepz": 1}}, "unknown key 'stepz'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(plan_values, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        reproduce.main(["--config", str(write(tmp_path / "plan.yaml", plan_values | change)), "--device", "cpu"])
    assert not (tmp_path / "out").exists()


def test_unknown_tables_and_measures(plan_values, tmp_path):
    config = str(write(tmp_path / "plan.yaml", plan_values))
    with pytest.raises(UserError, match="got table 'second', expected some of first"):
        reproduce.main(["--config", config, "--tables", "second"])
    with pytest.raises(UserError, match="got --jobs 0"):
        reproduce.main(["--config", config, "--jobs", "0"])
    assert lookup({"a": {"b": 2.0}}, "a.b") == 2.0
    with pytest.raises(UserError, match=r"got the measure 'a\.c'"):
        lookup({"a": {"b": 2.0}}, "a.c")


def test_a_spread_is_of_the_values_that_are_there():
    assert (spread([1.0, None, 3.0], 1), spread([1.0], 2), spread([None], 1)) == ("2.0 ± 1.4", "1.00", "-")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["reproduction", "steering"])
def test_the_shipped_plans(name, quick):
    plan = load_reproduction(f"configs/eval/{name}.yaml", quick=quick)
    assert isinstance(plan, Reproduction) and len(plan.seeds) >= 3
    used = {name for name in plan_tasks(plan) if "/" not in name}
    assert used == set(plan.trainings) or (quick and used < set(plan.trainings))
    for name in plan.trainings:
        plan.stage(name)
    for table in plan.tables.values():
        for row in table.rows.values():
            plan.entry(row)
        if table.grid:
            reproduction.grid_of(table, quick)
