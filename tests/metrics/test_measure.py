"""Files and folders to measures: what counts as a clip, what is written, what is refused."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from animatediff.media.video import save_video
from animatediff.metrics.measure import evaluate_videos, find_clips, format_table
from animatediff.metrics.tables import write_csv
from animatediff.utils import UserError
from animatediff.world.evaluate import shuffle_frames
from animatediff.world.shapes import make_scene, render


def gray(*levels: float) -> Tensor:
    """A clip of flat frames, in [0, 1]."""
    return torch.tensor(levels, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 16, 16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of Shapes, the toy data set, as it is, with its frames shuffled, and with its first frame held."""
    folder = tmp_path_factory.mktemp("world")
    clip = render([make_scene(3, seed=1, motion="right")])
    for name, video in {
        "rendered": clip,
        "shuffled": shuffle_frames(clip),
        "frozen": clip[:, :1].repeat_interleave(16, 1),
    }.items():
        save_video(video[0] / 2 + 0.5, folder / f"{name}.webp" if name == "frozen" else folder / name, fps=8)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "clips.csv").open(encoding="utf-8")))


def test_good_and_bad_clips(world, tmp_path):
    result = evaluate_videos([world], output_dir=tmp_path)
    by_name = {Path(row["path"]).stem: row for row in rows(tmp_path)}
    good, bad, frozen = (by_name[name] for name in ("rendered", "shuffled", "frozen"))
    assert abs(float(good["direction"])) < 10 and float(good["coherence"]) > 0.9 > 0.3 > float(bad["coherence"])
    assert float(good["top_speed"]) == pytest.approx(28 / 15, rel=0.2)
    assert float(good["evenness"]) > 0.8 and float(bad["evenness"]) < 0.3
    assert 5 * float(good["flicker"]) < float(bad["flicker"]) and 4 * float(good["warp_error"]) < float(
        bad["warp_error"]
    )
    assert (frozen["frames"], frozen["height"], frozen["fps"], frozen["seam"]) == ("16", "64", "8.0", "")
    assert float(frozen["speed"]) == 0 and float(frozen["change"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert result["clips"] == 3 and result["measures"]["seam"]["clips"] == 2
    assert result["measures"]["speed"]["highest"] == float(bad["speed"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width >= 16 * 64 and 3 * 64 < sheet.height < 3 * 90


def test_the_folder_of_an_animate_run(tmp_path):
    for i, prompt in enumerate(["a fox", "a fox", {"0": "a fox", "1": "an owl"}]):
        settings = {"prompt": prompt, "seed": i}
        save_video(gray(0.2 * i, 0.2 * i + 0.1), tmp_path / "sample" / f"{i}-clip.gif", metadata=settings)
    save_video(gray(0, 1), tmp_path / "sample.gif")
    (tmp_path / "config.yaml").touch()
    result = evaluate_videos([tmp_path], output_dir=tmp_path / "out")
    assert [(row["prompt"], row["seed"]) for row in rows(tmp_path / "out")] == [
        ("a fox", "0"),
        ("a fox", "1"),
        ("0: a fox; 1: an owl", "2"),
    ]
    assert result["diversity"] == [{"prompt": "a fox", "clips": 2, "diversity": pytest.approx(0.4, abs=0.01)}]
    assert "diversity of a fox" in format_table(result)


def test_what_counts_as_a_clip(tmp_path):
    for name in ("b/10.gif", "b/9.gif", "a/frames", "a/.hidden.gif", "c.webp"):
        save_video(gray(0, 1), tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found = find_clips([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/frames", "b/9.gif", "b/10.gif", "c.webp"]
    assert find_clips([tmp_path / "c.webp", tmp_path, tmp_path / "a" / "frames"])[1:] == found[:3]


def test_the_sheet_of_an_earlier_evaluation_is_no_clip(tmp_path):
    save_video(gray(0, 1), tmp_path / "clip.gif")
    evaluate_videos([tmp_path / "clip.gif"], output_dir=tmp_path / "evaluation")
    assert find_clips([tmp_path]) == [tmp_path / "clip.gif"]


def test_single_frames_and_unequal_clips(tmp_path):
    save_video(gray(0.5), tmp_path / "one.gif")
    save_video(gray(0.5, 0.6)[..., :5], tmp_path / "two", fps=12)
    result = evaluate_videos([tmp_path], output_dir=tmp_path / "out")
    assert result["diversity"] == [] and result["measures"]["speed"] == {
        "mean": 0,
        "lowest": 0,
        "highest": 0,
        "clips": 1,
    }
    assert result["measures"]["evenness"]["mean"] is None and "evenness" in format_table(result)


def test_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.gif").write_text("hello")
    with pytest.raises(UserError, match=r"nowhere\.gif, which does not exist"):
        find_clips([tmp_path / "nowhere.gif"])
    with pytest.raises(UserError, match=r"notes\.txt, expected a file ending in \.gif, \.mp4, \.webp or a folder"):
        find_clips([tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="empty, which has no clip in it"):
        find_clips([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"broken\.gif, expected a picture \(GIF.*: it is none"):
        evaluate_videos([tmp_path / "broken.gif"])
    with pytest.raises(UserError, match=r"cannot make the folder .*notes\.txt.* choose another --output-dir"):
        evaluate_videos([tmp_path / "broken.gif"], output_dir=tmp_path / "notes.txt")


def test_damaged_clips_are_named(tmp_path):
    whole = save_video(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), tmp_path / "clip.gif")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=r"clip\.gif, which cannot be decoded"):
        evaluate_videos([whole])
    frames = save_video(gray(0, 1), tmp_path / "frames")
    Image.new("RGB", (4, 4)).save(frames / "0002.png")
    with pytest.raises(UserError, match="frames of 4x4 and 16x16 pixels, expected one size"):
        evaluate_videos([frames])


def test_a_clip_that_cannot_be_read_is_left_out(tmp_path):
    whole = save_video(gray(0, 100), tmp_path / "a.gif")
    (tmp_path / "b.gif").write_text("hello")
    result = evaluate_videos([tmp_path], output_dir=tmp_path / "out")
    assert result["clips"] == 1 and [row["path"] for row in rows(tmp_path / "out")] == [str(whole)]
    assert "b.gif, expected a picture" in result["left_out"][str(tmp_path / "b.gif")]


def test_a_distance_of_what_can_be_read(tmp_path):
    """All else is measured where too few are left."""
    for folder in ("a", "b"):
        for name in ("1", "2"):
            save_video(gray(0, 100), tmp_path / folder / f"{name}.gif")

    def features(video):
        return video.mean((0, 1, 3, 4))[None]

    def distance():
        return evaluate_videos([tmp_path / "a"], extractor=features, against=[tmp_path / "b"])

    assert distance()["fvd"]["against"] == 2
    (tmp_path / "b/1.gif").write_text("hello")
    result = distance()
    assert result["clips"] == 2 and "fvd" not in result and list(result["left_out"]) == [str(tmp_path / "b/1.gif")]


@pytest.mark.parametrize("prompt", [7, 1.5, True, [1, None], {"0": 3}, "a\nb\x1b[2J", "x" * 10_000, None])
def test_what_a_file_says_of_its_prompt_may_be_anything(tmp_path, prompt):
    for name in ("a\nb", "c"):  # a name of two lines, too
        save_video(gray(0.1, 0.5), tmp_path / f"clips/{name}.gif", fps=8, metadata={"prompt": prompt, "seed": [prompt]})
    result = evaluate_videos([tmp_path / "clips"], output_dir=tmp_path / "out")
    table = format_table(result)
    assert all(line.isprintable() for line in table.splitlines()) and "diversity of " in table
    assert {row["seed"] for row in rows(tmp_path / "out")} == {""}


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+a", "'+a"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-2+3+cmd|' /C calc'!A0", "'-2+3+cmd|' /C calc'!A0"),
        ("\t=1", "'\t=1"),
        ("-0.2 ± 0.1", "-0.2 ± 0.1"),
        ("-", "-"),
        ("a = b", "a = b"),
        (-0.5, "-0.5"),
        (None, ""),
    ],
)
def test_no_cell_is_a_formula(tmp_path, text, cell):
    write_csv(tmp_path / "x.csv", [{"a": text}])
    assert list(csv.reader((tmp_path / "x.csv").open(newline="", encoding="utf-8"))) in ([["a"], [cell]], [["a"], []])
