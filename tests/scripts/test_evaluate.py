"""scripts/evaluate.py: a model through the scorer, or any clips, as files and a table."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from animatediff.media.video import save_video
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from scripts import evaluate
from tests.nano import entry, write_config, write_files
from tests.tiny_clip import write_clip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("nano"))
    return write_config(folder / "run.yaml", entry(folder, L=16, H=64, W=64, steps=1, guidance_scale=1.0))


@pytest.mark.slow
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
    assert "generated shuffled rendered" in " ".join(out.split()) and out.splitlines()[-1] == str(tmp_path)


@pytest.mark.slow
def test_the_config_names_the_motion_module(config, tmp_path):
    evaluate.main(["--config", str(config), "--captions", "1", "--device", "cpu", "--output-dir", str(tmp_path)])
    settings = json.loads((tmp_path / "summary.json").read_text())["settings"]
    assert settings["motion_module"].endswith("mm_v3.safetensors") and settings["steps"] == 1


@pytest.mark.slow
def test_an_entry_and_motions_of_the_camera(config, tmp_path, capsys):
    entries = yaml.safe_load(config.read_text())
    both = write_config(tmp_path / "two.yaml", *entries, entries[0] | {"name": "second", "guidance_scale": 1.5})
    evaluate.main(
        ["--config", str(both), "--entry", "1", "--motions", "zoom_in", "orbit", "--captions", "2", "--device", "cpu"]
        + ["--output-dir", str(tmp_path / "out")]
    )
    assert "entry second is measured, --entry 1 of 0 to 1" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["settings"]["entry"] == "second" and summary["settings"]["guidance_scale"] == 1.5
    assert list(summary["rendered"]["by_motion"]) == ["zoom_in", "orbit"] == summary["settings"]["motions"]
    assert summary["rendered"]["motion"] == 100


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({}, ["--entry", "1"], "got --entry 1, but .* has 1, expected 0 to 0"),
        ({}, ["--motions", "orbit", "dolly"], "motions: got 'dolly', expected motions of the data set: still"),
        ({}, ["--style", "oil"], "style: got 'oil', expected one of plain"),
        ({"L": 8}, [], "entry a: got L=8 H=64 W=64, expected L=16 H=64 W=64"),
        ({"image": "x.png"}, [], "entry a: got image, expected none: clips are made from captions alone"),
        ({"controlnet_path": "x", "controlnet_images": "y"}, [], "entry a: got controlnet_images.0., expected none"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_loaded(
    config, tmp_path, monkeypatch, values, options, message
):
    monkeypatch.setattr(AnimateDiffPipeline, "from_config", lambda *_, **__: pytest.fail("loaded"))
    (one,) = yaml.safe_load(config.read_text())
    path = write_config(tmp_path / "one.yaml", one | {"name": "a"} | values)
    with pytest.raises(UserError, match=message):
        evaluate.main(["--config", str(path), *options])


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
    evaluate.main(["--videos", str(tmp_path / "fade.gif"), "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "clips.csv", "sheet.png"}
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["mean", "lowest", "highest", "clips"] and out[-1] == str(tmp_path / "out")
    assert next(line.split() for line in out if line.startswith("seam")) == ["seam", "3", "3", "3", "1"]


@pytest.mark.parametrize("option", [["--captions", "3"], ["--config", "x.yaml"], ["--guidance-scale", "0"]])
def test_videos_or_a_model(option, tmp_path):
    with pytest.raises(UserError, match=f"got --videos and {option[0]}, expected one or the other"):
        evaluate.main(["--videos", str(tmp_path), *option])


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    assert "got nowhere.gif, which does not exist" in mistake(evaluate.main, "--videos", "nowhere.gif")
    assert not list(tmp_path.iterdir())


def test_options_are_checked_in_one_line():
    with pytest.raises(UserError, match="--videos: expected at least one argument"):
        evaluate.main(["--videos"])


def test_with_a_local_clip(tmp_path, capsys):
    """A clip that moves and has a prompt, and one that stands still and has none, beside pictures of the second."""
    clips, folder = tmp_path / "clips", write_clip(tmp_path / "clip")
    moving, still = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_video(moving, clips / "a.webp", metadata={"prompt": "a red fox"})
    save_video(still[:1].expand(3, -1, -1, -1), clips / "b.webp")
    arguments = ["--videos", str(clips), "--clip", str(folder), "--reference", str(clips / "b.webp"), "--device", "cpu"]
    evaluate.main([*arguments, "--fvd-against", str(clips), "--output-dir", str(tmp_path / "out")])
    a, b = csv.DictReader((tmp_path / "out" / "clips.csv").open(encoding="utf-8"))
    assert -100 <= float(a["text_alignment"]) <= 100 and b["text_alignment"] == ""
    assert float(b["frame_consistency"]) == float(b["domain_similarity"]) == 100
    assert float(a["frame_consistency"]) < 100 > float(a["domain_similarity"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["encoder"].startswith(f"{folder} (sha256 ")
    assert summary["settings"]["references"] == [str(clips / "b.webp")]
    assert summary["measures"]["text_alignment"]["clips"] == 1
    fvd = summary["fvd"]
    assert fvd["distance"] == pytest.approx(0, abs=1e-6) and (fvd["clips"], fvd["against"]) == (2, 2)
    assert fvd["features"] == 3 * 512 and fvd["extractor"].startswith(f"frames and changes of {folder}")
    out = capsys.readouterr().out.splitlines()
    assert next(line for line in out if line.startswith("fvd")).endswith("2 to 2")


def test_a_distance_needs_several_clips(tmp_path):
    for name in ("a.gif", "b/c.gif"):
        save_video(torch.rand(2, 3, 16, 16), tmp_path / name)
    one, both = ["--videos", str(tmp_path / "a.gif")], ["--videos", str(tmp_path)]
    folder = ["--clip", str(write_clip(tmp_path / "clip"))]
    with pytest.raises(UserError, match="videos: got 1 clip, expected at least two for the Fréchet distance"):
        evaluate.main([*one, *folder, "--fvd-against", str(tmp_path)])
    with pytest.raises(UserError, match="against: got 1 clip, expected at least two"):
        evaluate.main([*both, *folder, "--fvd-against", str(tmp_path / "b")])
    with pytest.raises(UserError, match="a.gif, which is no TorchScript file"):
        evaluate.main([*both, "--fvd-against", str(tmp_path), "--fvd-features", str(tmp_path / "a.gif")])


def test_options_that_belong_together(tmp_path):
    with pytest.raises(UserError, match="got --clip, --fvd-against without --videos, expected both"):
        evaluate.main(["--clip", "--fvd-against", "x"])
    with pytest.raises(UserError, match="got --fvd-features without --fvd-against"):
        evaluate.main(["--videos", str(tmp_path), "--fvd-features", "i3d.pt"])
