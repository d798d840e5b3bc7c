"""scripts/evaluate.py: a model through the scorer, as files and a table."""

import json
from pathlib import Path

import pytest

from animatediff.utils import UserError
from scripts import evaluate
from tests.nano import entry, write_config, write_files


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("nano"))
    return write_config(folder / "run.yaml", entry(folder, L=16, H=64, W=64, steps=1, guidance_scale=1.0))


def test_a_model_without_motion_module(config, tmp_path, capsys):
    """The golden network draws noise: everything is written, nothing is right."""
    evaluate.main(
        ["--config", str(config), "--motion", "none", "--captions", "1", "--steps", "2"]
        + ["--device", "cpu", "--output-dir", str(tmp_path)]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["motion_module"] == "none" and summary["settings"]["steps"] == 2
    assert summary["generated"]["clips"] == 1 and summary["generated"]["motion"] == 0
    assert summary["rendered"]["all"] == 100
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "clips.csv", "sheet.png"}
    out = capsys.readouterr().out
    assert "generated    shuffled    rendered" in out and out.splitlines()[-1] == str(tmp_path)


def test_the_config_names_the_motion_module(config, tmp_path):
    evaluate.main(["--config", str(config), "--captions", "1", "--device", "cpu", "--output-dir", str(tmp_path)])
    settings = json.loads((tmp_path / "summary.json").read_text())["settings"]
    assert settings["motion_module"].endswith("mm_v3.safetensors") and settings["steps"] == 1


def test_mistakes(config, tmp_path):
    with pytest.raises(UserError, match="--captions 0"):
        evaluate.main(["--captions", "0"])
    with pytest.raises(UserError, match="argument --captions: invalid int value: 'many'"):
        evaluate.main(["--captions", "many"])
    with pytest.raises(UserError, match="there is no nowhere.safetensors"):
        evaluate.main(["--config", str(config), "--motion", "nowhere.safetensors", "--output-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
