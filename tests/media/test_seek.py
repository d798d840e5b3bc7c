"""Seeking finds the very frames that decoding the whole file would."""

import os

import pytest

from animatediff.media import seek as video_seek
from animatediff.media.seek import UnusableVideo, probe, read_frames
from tests.media.videos import ffmpeg, numbers, write


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write(tmp_path_factory.mktemp("seek") / "a: clip, 'quoted'.mp4")


@pytest.mark.parametrize(
    ("start", "stride", "expected"),
    [
        (0, 1, range(0, 8)),
        (0, 4, range(0, 32, 4)),
        (13, 3, range(13, 37, 3)),
        (32, 1, range(32, 40)),
        (33, 2, range(33, 40, 2)),  # the file ends before
        (40, 1, range(0)),
    ],
)
def test_the_frames_that_were_asked_for(video, start, stride, expected):
    frames = read_frames(video, fps=25, start=start, stride=stride, count=8, cover=(24, 24))
    assert numbers(frames) == list(expected)
    assert not len(frames) or frames.shape[1:] == (24, 32, 3)


def test_the_header(video):
    info = probe(video)
    assert (info.fps, info.frames, info.variable_rate) == (25, 40, False)


def test_a_variable_rate_becomes_constant(video, tmp_path):
    """Every third frame of the second part is left: there each is shown three times as long."""
    path = tmp_path / "variable.mp4"
    ffmpeg("-i", str(video), "-vf", "select='lt(n,12)+not(mod(n,3))'", "-fps_mode", "vfr", str(path))
    info = probe(path)
    assert info.variable_rate and info.fps < 20
    found = numbers(read_frames(path, fps=25, start=0, stride=1, count=36, cover=(8, 8)))
    assert found == [*range(12), *(i // 3 * 3 for i in range(12, 36))]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_file_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    """A named pipe that nobody writes to: its first byte never comes."""
    os.mkfifo(stuck := tmp_path / "stuck.mp4")
    monkeypatch.setattr(video_seek, "TIMEOUT", 0.2)
    with pytest.raises(UnusableVideo, match="unreadable .ffmpeg needs more than 0.2 s"):
        read_frames(stuck, fps=25, start=0, stride=1, count=8, cover=(24, 24))
