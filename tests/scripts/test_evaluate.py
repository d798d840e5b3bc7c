"""scripts/evaluate.py: a model through the scorer, or any clips, as files and a table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from animatediff.data.video_io import save_video
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


def test_videos(tmp_path, capsys):
    save_video(torch.linspace(0, 1, 4)[:, None, None, None].expand(-1, 3, 16, 16), tmp_path / "fade.gif")
    evaluate.main(["--videos", str(tmp_path / "fade.gif"), "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "clips.csv", "sheet.png"}
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["mean", "lowest", "highest", "clips"] and out[-1] == str(tmp_path / "out")
    assert next(line.split() for line in out if line.startswith("seam")) == ["seam", "3", "3", "3", "1"]


@pytest.mark.parametrize("option", [["--captions", "3"], ["--config", "x.yaml"], ["--guidance-scale", "0"]])
def test_videos_or_a_model(option, tmp_path):
    with pytest.raises(UserError, match=f"got --videos and {option[0]}, expected one or the other"):
        evaluate.main(["--videos", str(tmp_path), *option])


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    script = Path(evaluate.__file__)
    result = subprocess.run(
        [sys.executable, str(script), "--videos", "nowhere.gif"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "got nowhere.gif, which does not exist" in result.stderr
    assert not list(tmp_path.iterdir())


def test_options_are_checked_in_one_line():
    with pytest.raises(UserError, match="--videos: expected at least one argument"):
        evaluate.main(["--videos"])
