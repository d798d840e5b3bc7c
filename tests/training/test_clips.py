"""Lists of every kind, crops, and files of every kind of brokenness; a clip depends on its seed and number alone."""

import json
import os
import signal
from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from animatediff.config.settings import build
from animatediff.training.data.clips import Clip, ClipConfig, Clips, list_videos
from animatediff.training.data.reader import ClipReader
from animatediff.utils import UserError
from tests.media.videos import encode, numbers, write, write_broken


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good videos: 40, 40 and 16 frames."""
    folder = tmp_path_factory.mktemp("videos")
    write(folder / "a.mp4", caption="first\n")
    write(folder / "deep/er/b.MP4".lower(), caption="second")
    write(folder / "c.mp4", caption="third", frames=16)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    return folder, write_broken(folder)


def config(folder, **values) -> ClipConfig:
    return ClipConfig(
        video_folder=str(folder), **{"sample_size": (24,), "sample_stride": 2, "sample_n_frames": 8} | values
    )


def frame_numbers(clip: torch.Tensor) -> list[int]:
    return numbers(((clip + 1) * 127.5).movedim(1, -1))


# ---- lists


def test_a_folder(folder):
    videos = list_videos(config(folder))
    assert [(v.path.name, v.caption) for v in videos] == [("a.mp4", "first"), ("c.mp4", "third"), ("b.mp4", "second")]


@pytest.mark.parametrize(
    ("name", "text", "video_folder", "expected"),
    [
        (
            "w.csv",
            'videoid,name,page_dir\n12,"a fox, red",x\n13,b,x\n',
            "v",
            [("v/12.mp4", "a fox, red"), ("v/13.mp4", "b")],
        ),
        ("p.csv", "\ufeffpath,caption\nx/1.mov,a fox\n2.mp4\n", "", [("x/1.mov", "a fox"), ("2.mp4", None)]),
        ("p.jsonl", json.dumps({"caption": "a\nfox", "path": "1.mp4"}) + "\n\n", "v", [("v/1.mp4", "a\nfox")]),
    ],
)
def test_lists(tmp_path, name, text, video_folder, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    given = str(tmp_path / video_folder) if video_folder else ""
    videos = list_videos(ClipConfig(csv_path=str(tmp_path / name), video_folder=given))
    assert [(str(v.path.relative_to(tmp_path)), v.caption) for v in videos] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "file,text\n1.mp4,a\n", "row 1 of file, text, expected videoid and name"),
        ("x.csv", "path,caption\n", "without a video"),
        ("x.csv", f"path,caption\n1.mp4,a\n2.mp4,{'a' * 200_000}\n", r"x.csv whose row 2 is no CSV \(field larger"),
        ("x.jsonl", '{"path": "a"}\n{"path":', "line 2 is no JSON"),
        ("x.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("x.jsonl", '{"path": ' + "1" * 5000 + "}", "line 1 is no JSON"),
        ("x.jsonl", '{"path": "a", "caption": "\\ud800"}', "row 1 is not UTF-8"),
        ("x.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("none.csv", None, "none.csv, which is no file"),
    ],
)
def test_bad_lists(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list_videos(ClipConfig(csv_path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "where"),
    [("x.csv", "x.csv whose row 2"), ("x.jsonl", "x.jsonl whose row 2"), ("x.txt", "x.txt, which")],
)
def test_captions_that_are_not_utf8_are_named(tmp_path, name, where):
    """As Excel on Windows writes them; nothing is guessed."""
    rows = {
        "x.csv": "path,caption\n1.mp4,red\n2.mp4,grün\n",
        "x.jsonl": '{"path": "1.mp4", "caption": "red"}\n{"path": "2.mp4", "caption": "grün"}\n',
        "x.txt": "grün",
    }[name]
    (tmp_path / "x.mp4").write_bytes(b"")
    (tmp_path / name).write_text(rows, encoding="cp1252")
    given = {"video_folder": str(tmp_path)} if name == "x.txt" else {"csv_path": str(tmp_path / name)}
    with pytest.raises(UserError, match=rf"{where} is not UTF-8 text \(byte 0xfc\), expected UTF-8: save it again"):
        list_videos(ClipConfig(**given))
    (tmp_path / name).write_text(rows, encoding="utf-8-sig")
    assert list_videos(ClipConfig(**given))[-1].caption == "grün"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither csv_path nor video_folder"),
        ({"video_folder": "x", "camera": "dolly"}, "camera: got 'dolly', expected one of zoom_in"),
        ({"video_folder": "x", "sample_size": (8, 8, 8)}, "sample_size"),
        ({"video_folder": "x", "sample_stride": 0}, "sample_stride: got 0"),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(UserError, match=message):
        build(ClipConfig, values, where="train_data")


# ---- clips


def test_a_clip(folder):
    clips = Clips(config(folder, sample_n_frames=4, sample_stride=5), seed=3)
    for index in range(3):
        pixels, caption, *_ = clips[index]
        assert pixels.shape == (4, 3, 24, 24) and pixels.dtype == torch.float32 and pixels.abs().max() <= 1
        found = frame_numbers(pixels)
        assert found == list(range(found[0], found[0] + 20, 5)) and found[-1] < (16 if caption == "third" else 40)


def test_a_clip_depends_on_seed_and_number_alone(folder):
    varied = config(folder, crop="random", flip=True)
    one, two = Clips(varied, seed=1), Clips(varied, seed=1)
    forward = [one[i] for i in (4, 5)]
    for clip, index in zip(reversed(forward), (5, 4), strict=True):
        again = two[index]
        assert torch.equal(clip.pixels, again.pixels) and clip[1:] == again[1:]
    assert not torch.equal(Clips(varied, seed=2)[4].pixels, forward[0].pixels)


def test_every_video_comes_once_in_each_round(folder, monkeypatch):
    clips = Clips(config(folder), seed=0)
    monkeypatch.setattr(clips, "_draw", lambda video, rng: torch.zeros(0))
    captions = [clips[i].caption for i in range(30)]
    rounds = [tuple(captions[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(r) == ["first", "second", "third"] for r in rounds) and len(set(rounds)) > 2


def test_crops_and_flips(folder):
    """The left half of every picture is redder: a window shows how much of it it has, and on which side."""

    def red(clip: torch.Tensor) -> list[bool]:
        row = (clip[0, 0] - clip[0, 2])[12] > 0.08
        return [bool(row[2]), bool(row[-3])]

    center = Clips(config(folder, sample_n_frames=1), seed=0)
    assert all(red(center[i].pixels) == [True, False] for i in range(2))
    flipped = Clips(config(folder, sample_n_frames=1, flip=True), seed=0)
    assert {tuple(red(flipped[i].pixels)) for i in range(8)} == {(True, False), (False, True)}
    square = Clips(config(folder, sample_n_frames=1, sample_size=(48, 16), crop="random"), seed=0)
    assert len({tuple(red(square[i].pixels)) for i in range(8)}) > 1


def test_a_camera_zooms_into_the_middle(folder):
    clip = Clips(config(folder, camera="zoom_in", sample_size=(24, 32)), seed=0)[0].pixels
    assert clip.shape == (8, 3, 24, 32)
    assert (frame_numbers(clip)[-1] - frame_numbers(clip)[0]) == 14  # the clip itself goes on


# ---- files that are broken


def test_the_report_counts_and_names(broken):
    folder, reasons = broken
    report = Clips(config(folder, sample_n_frames=16)).scan(threads=2)
    assert report.kind == "videos" and report.variable_rate == [folder / "uneven.mp4"]
    assert {path.name: problem.reason for path, problem in report.unusable} == reasons
    assert report.usable == 2 and report.total == len(reasons) + 2
    text = str(report)
    assert text.startswith("2 of 10 videos can be used")
    assert text.endswith(f"used, resampled from a variable frame rate: 1\n  {folder / 'uneven.mp4'}")
    for reason, count in Counter(reasons.values()).items():
        assert f"{reason}: {count}" in text
    assert all(name in text for name in reasons) and "6 of 16 frames at stride 2" in text


def test_training_goes_on_with_the_next_video_and_names_the_bad_one_once(broken):
    folder, reasons = broken
    lines = []
    reader = ClipReader(Clips(config(folder, sample_n_frames=16), seed=0), num_workers=2, log=lines.append)
    batches = list(reader.batches([range(5), range(5, 10)]))  # every file's turn comes
    assert [caption for batch in batches for caption in batch.captions] == ["a gray wall"] * 10
    assert len({name for batch in batches for name in batch.names} - {str(folder / name) for name in reasons}) == 2
    assert sorted(line.split("/")[-1].split(":")[0] for line in lines) == sorted(reasons)
    assert lines[-1].endswith("(8 of 10 files so far)")


def test_nothing_but_bad_videos(tmp_path):
    (tmp_path / "list.csv").write_text("videoid,name\n1,a\n2,b\n")
    reader = ClipReader(Clips(ClipConfig(csv_path=str(tmp_path / "list.csv"))), num_workers=1, log=lambda line: None)
    with pytest.raises(UserError, match="2 files of which none gives a clip of 61 frames"):
        next(reader.batches([range(1)]))


class Numbered(Dataset):
    """Clip i is the number i; the process of clip 5 is killed."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return Clip(torch.full((1,), float(index)), str(index), "a", {})


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing(num_workers):
    """Batches come in the order in which they are asked for; nothing is drawn from torch's own generator."""
    numbers, before = [range(2), [4, 3], range(7, 9)], torch.get_rng_state()
    batches = list(ClipReader(Numbered(), num_workers=num_workers).batches(numbers))
    assert [batch.video.flatten().tolist() for batch in batches] == [[0, 1], [4, 3], [7, 8]]
    assert [batch.captions for batch in batches] == [["0", "1"], ["4", "3"], ["7", "8"]]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_the_system_ends_is_named():
    with pytest.raises(UserError, match="a reader of clips that the system ended .* lower num_workers"):
        list(ClipReader(Numbered(), num_workers=1).batches([range(4, 6)]))


def test_sound_that_outlasts_the_pictures(tmp_path):
    """The header counts the longest stream; a start behind the last picture falls back to the first."""
    encode(tmp_path / "long.mkv", range(16), sound=3)
    (tmp_path / "long.txt").write_text("gray")
    pixels = Clips(config(tmp_path), seed=0)[0].pixels
    assert frame_numbers(pixels) == list(range(0, 16, 2))
