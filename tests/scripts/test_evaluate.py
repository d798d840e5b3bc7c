"""scripts/evaluate.py: a model through the scorer, or any clips, as files and a table."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from animatediff.data.shapes import make_scene, render
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


def test_what_the_prompt_and_other_pictures_say(tmp_path, capsys):
    """The world's encoder: a clip that is what its prompt says, one that is not; and both far from other clips."""
    scenes = [make_scene(i, seed=1, color=color, shape="star") for i, color in enumerate(["red", "blue"])]
    for i, video in enumerate(render(scenes) / 2 + 0.5):
        save_video(video, tmp_path / "clips" / f"{i}.webp", metadata={"prompt": scenes[0].caption})
        save_video(video.flip(0), tmp_path / "others" / f"{i}.webp")
    save_video(render(scenes[:1], only_frames=np.array([[0, 8]]))[0] / 2 + 0.5, tmp_path / "images")
    arguments = ["--videos", str(tmp_path / "clips"), "--reference", str(tmp_path / "images"), "--device", "cpu"]
    evaluate.main([*arguments, "--fvd-against", str(tmp_path / "others"), "--output-dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "clips.csv").open(encoding="utf-8")))
    for name in ("text_alignment", "domain_similarity"):
        assert float(rows[0][name]) > float(rows[1][name]) + 20
    assert all(50 < float(row["frame_consistency"]) <= 100 for row in rows)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["encoder"] == "world" and summary["settings"]["references"] == [str(tmp_path / "images")]
    assert summary["measures"]["text_alignment"]["clips"] == 2
    assert summary["fvd"] | {"distance": 0} == {
        "distance": 0,
        "clips": 2,
        "against": 2,
        "features": 192,
        "extractor": "frames and changes of world",
    }
    out = capsys.readouterr().out
    assert "text_alignment" in out and next(line for line in out.splitlines() if line.startswith("fvd")).endswith(
        "2 to 2"
    )


def test_a_distance_needs_several_clips(tmp_path):
    for name in ("a.gif", "b/c.gif"):
        save_video(torch.rand(2, 3, 16, 16), tmp_path / name)
    one, both = ["--videos", str(tmp_path / "a.gif")], ["--videos", str(tmp_path)]
    with pytest.raises(UserError, match="videos: got 1 clip, expected at least two for the Fréchet distance"):
        evaluate.main([*one, "--fvd-against", str(tmp_path)])
    with pytest.raises(UserError, match="against: got 1 clip, expected at least two"):
        evaluate.main([*both, "--fvd-against", str(tmp_path / "b")])
    with pytest.raises(UserError, match="a.gif, which is no TorchScript file"):
        evaluate.main([*both, "--fvd-against", str(tmp_path), "--fvd-features", str(tmp_path / "a.gif")])


def test_options_that_belong_together(tmp_path):
    with pytest.raises(UserError, match="got --clip, --fvd-against without --videos, expected both"):
        evaluate.main(["--clip", "--fvd-against", "x"])
    with pytest.raises(UserError, match="got --fvd-features without --fvd-against"):
        evaluate.main(["--videos", str(tmp_path), "--fvd-features", "i3d.pt"])
    with pytest.raises(UserError, match="got --videos and --device, expected one or the other"):
        evaluate.main(["--videos", str(tmp_path), "--device", "cpu"])
