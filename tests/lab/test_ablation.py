"""A grid of two cells on networks of a few thousand weights: it runs, goes on, and tables what it found."""

import csv
import json

import pytest
import torch
import yaml

from animatediff.checkpoints.export import save_motion_module
from animatediff.features.noise import seeded
from animatediff.lab.ablation import load_grid, merged, table_row, write_grid_table
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from scripts import ablate
from tests.training.test_stages import IMAGE, LOOP, MOTION, write
from tests.training.test_stages import trained as trained

CELLS = {
    "as it is": {},
    "no positional encoding": {"motion": {"positional_encoding": False}},
    "no zero-init": {"zero_init": False},
    "one": {"motion": {"attentions_per_block": 1}},
    "temporal convolution": {"motion": {"temporal": "convolution"}},
}


@pytest.fixture
def grid_file(trained, tmp_path):
    model = str(trained / "image/image.safetensors")
    train = write(tmp_path / "train.yaml", MOTION | {"output_dir": "unused", "pretrained_model_path": model})
    animate = {"pretrained_model_path": model, "prompt": "a", "steps": 1, "guidance_scale": 1.0, "H": 64, "W": 64}
    grid = {
        "output_dir": str(tmp_path / "out"),
        "train": str(train),
        "animate": str(write(tmp_path / "animate.yaml", animate)),
        "common": {"loop": LOOP | {"steps": 2}},
        "cells": CELLS,
        "seeds": [0, 1],
        "captions": 2,
        "quick": {"seeds": [3], "common": {"loop": {"steps": 1}}},
    }
    return write(tmp_path / "grid.yaml", grid)


@pytest.mark.slow
def test_a_grid(grid_file, tmp_path, capsys, monkeypatch):
    ablate.main(["--grid", str(grid_file), "--quick"])
    table = capsys.readouterr().out
    assert "motion %" in table and "1 steps, 2 clips seen, of 4 that show still, left, " in table
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["cell"] for row in rows] == list(CELLS)
    results = {cell: json.loads((tmp_path / f"out/{cell}/3/result.json").read_text()) for cell in CELLS}
    assert all(result["clips"] == 2 for result in results.values())
    assert "| as it is | " in (tmp_path / "out/table.md").read_text()
    monkeypatch.setattr("animatediff.lab.ablation.measure", lambda *rest: pytest.fail("done already"))
    ablate.main(["--grid", str(grid_file), "--quick"])
    assert table.splitlines()[-5:] == capsys.readouterr().out.splitlines()[-5:]
    write_grid_table(load_grid(grid_file, quick=True), ["one", "as it is"])
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| one", "| as it is"] and lines[4] == ""
    assert [row["cell"] for row in csv.DictReader((tmp_path / "out/table.csv").open())] == list(CELLS)
    path = tmp_path / "out/one/3/result.json"
    path.write_text(json.dumps(results["one"] | {"made": "otherwise"}))
    with pytest.raises(UserError, match="of other values than the config's"):
        ablate.main(["--grid", str(grid_file), "--quick"])


@pytest.mark.parametrize("cell", ["no positional encoding", "temporal convolution"])
def test_a_variant_animates_as_it_was_trained(grid_file, tmp_path, cell):
    """Its file is all that is needed, and says what it is; positions cannot be stretched where there are none."""
    grid = load_grid(grid_file)
    stage = grid.stage(cell, 0)
    stage.run(lambda line: None)
    files = {"pretrained_model_path": stage.pretrained_model_path, "device": "cpu"}
    trained = f"{stage.output_dir}/motion.safetensors"
    pipeline = AnimateDiffPipeline.from_config(grid.animate, motion_module=trained, **files)
    assert pipeline.model.unet.config.motion == stage.motion
    call = {"num_frames": 4, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    clip = pipeline("a", generator=seeded(0), **call).frames
    saved = save_motion_module(pipeline.model.unet, tmp_path / "again.safetensors")
    again = AnimateDiffPipeline.from_config(grid.animate, motion_module=str(saved), **files)
    assert torch.equal(again("a", generator=seeded(0), **call).frames, clip)
    with pytest.raises(UserError, match="pe_stretch: got 2, expected 1: the motion module has no positional encoding"):
        pipeline("a", pe_stretch=2.0, **call)


def test_mistakes_are_told_before_anything_starts(grid_file, tmp_path):
    values = yaml.safe_load(grid_file.read_text())
    for cells, message in (
        ({"a": {"motions": {}}}, "cell 'a': .*unknown key 'motions'"),
        ({}, "got 0 cells"),
        ({"a": IMAGE}, "cell 'a': got another stage|cell 'a': .*unknown key"),
    ):
        with pytest.raises(UserError, match=message):
            ablate.main(["--grid", str(write(tmp_path / "bad.yaml", values | {"cells": cells}))])
    assert not (tmp_path / "out").exists()


def test_merging():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}}, {"d": {}}) == {"a": {"b": 1, "c": 4}, "d": {}}


MOVED = {
    "still": {"clips": 5, "amplitude": None},
    "left": {"clips": 1, "amplitude": 1.0},
    "up": {"clips": 3, "amplitude": -0.2},
}


def test_a_row_is_a_mean_and_a_deviation():
    """The amplitude is a mean over the clips that are to move."""
    results = [
        {
            "motion": m,
            "place": 0,
            "shape": 50,
            "all": 1,
            "smoothness": 0.5,
            "flicker": 0,
            "drift": 0,
            "by_motion": MOVED,
        }
        for m in (70, 80, 90)
    ]
    row = table_row("x", results)
    assert (row["motion"], row["smoothness"]) == ("80.0 ± 10.0", "0.500 ± 0.000")
    assert row["amplitude"] == "0.100 ± 0.000"
    assert table_row("x", results[:1])["motion"] == "70.0"


def test_the_shipped_grid():
    for quick, cells, steps in ((False, 10, 3000), (True, 3, 1500)):  # cells of null are left out
        grid = load_grid("configs/eval/ablation.yaml", quick=quick)
        stages = [grid.stage(cell, 0) for cell in grid.cells]
        assert len({repr(stage) for stage in stages}) == len(stages) == cells
        assert {stage.loop.steps for stage in stages} == {steps}
