"""Seeking finds the very frames that decoding the whole file would."""

import time

import av
import numpy as np
import pytest
import torch

from animatediff.media import seek as video_seek
from animatediff.media.seek import UnusableVideo, probe, read_frames
from animatediff.media.video import is_complete, read_video, save_video
from animatediff.utils import UserError
from tests.media.videos import encode, numbered, numbers, write

SAMPLINGS = [  # fps, start, stride, the frames of a clip of 20 at 20 fps
    (None, 0, 1, list(range(20))),
    (None, 5, 1, list(range(5, 20))),
    (None, 3, 4, list(range(3, 20, 4))),
    (10, 0, 1, list(range(0, 20, 2))),
    (5, 2, 1, [2, 6, 10, 14, 18]),
    (8, 0, 1, [0, 2, 5, 7, 10, 12, 15, 17]),  # every 2.5 frames
    (40, 18, 1, [18, 18, 19, 19]),
    (10, 1, 3, [1, 7, 13, 19]),
]


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
    encode(path, [*range(12), *range(12, 40, 3)])
    info = probe(path)
    assert info.variable_rate and info.fps < 20
    found = numbers(read_frames(path, fps=25, start=0, stride=1, count=36, cover=(8, 8)))
    assert found == [*range(12), *(i // 3 * 3 for i in range(12, 36))]


def test_a_file_that_takes_too_long_is_given_up(video, monkeypatch):
    """Whatever libav is busy with."""
    monkeypatch.setattr(video_seek, "TIMEOUT", 0.2)
    monkeypatch.setattr(video_seek, "_read", lambda *arguments: time.sleep(2))
    with pytest.raises(UnusableVideo, match="unreadable .it takes more than 0.2 s"):
        read_frames(video, start=0, stride=1, count=8, cover=(24, 24))


@pytest.mark.parametrize(("fps", "start", "stride", "expected"), SAMPLINGS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "folder"])
def test_other_speeds_and_parts(tmp_path, name, fps, start, stride, expected):
    """Of a second at 20 fps; a format makes no difference."""
    path = save_video(numbered(20), tmp_path / name, fps=20)
    frames, speed = read_video(path, fps=fps, start=start, stride=stride)
    assert numbers(frames) == expected and speed == pytest.approx((fps or 20) / stride)
    some, _ = read_video(path, fps=fps, start=start, stride=stride, most=3)
    assert numbers(some) == expected[:3]


@pytest.mark.parametrize("fps", [8, 12, 24, 30, 60])
@pytest.mark.parametrize("source", [24, 25, 30])
def test_a_second_stays_a_second(tmp_path, source, fps):
    frames, _ = read_video(encode(tmp_path / "x.mkv", range(source), fps=source), fps=fps)
    assert len(frames) == fps
    expected = [int(i * source / fps + 1e-6) for i in range(fps)]
    assert max(abs(a - b) for a, b in zip(numbers(frames), expected, strict=True)) <= 1


def test_a_start_behind_the_end_is_told(video):
    with pytest.raises(UserError, match="no frames from number 40 on"):
        read_video(video, start=40)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("frames", [16, 400])
def test_half_a_file_is_no_clip(tmp_path, frames, keep):
    """Its index, in front, says how many frames there should be: nothing is shown twice in their place."""
    rng = np.random.default_rng(0)
    path = save_video(rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8), tmp_path / "x.mp4")
    data = path.read_bytes()
    pictures = data.index(b"mdat")
    path.write_bytes(data[: pictures + int(keep * (len(data) - pictures))])
    with pytest.raises(UserError, match="x.mp4, expected a video: (damaged|unreadable)"):
        read_video(path)
    with pytest.raises(UnusableVideo, match="damaged|unreadable"):
        read_frames(path, start=frames - 9, stride=1, count=9, cover=(8, 8))
    assert not is_complete(path)


def test_a_list_of_other_files_opens_none(tmp_path, video):
    """ffconcat, HLS playlists and SDP name files and addresses: whatever the name, only containers are read."""
    (tmp_path / "other.mp4").write_bytes(video.read_bytes())
    lists = {
        "concat.mp4": "ffconcat version 1.0\nfile other.mp4\n",
        "hls.mkv": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\nother.mp4\n#EXT-X-ENDLIST\n",
        "address.mov": "ffconcat version 1.0\nfile http://localhost:1/x.mp4\n",
        "stream.avi": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}, expected a video: unreadable"):
            read_video(tmp_path / name)


@pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV before 18 cannot write such files"
)
@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_a_phone_that_was_held_sideways(tmp_path, turned):
    """The left half is redder; the player is told how to turn it."""
    path = encode(tmp_path / "x.mp4", range(4), turned=turned)
    frames, _ = read_video(path)
    assert frames.shape[1:3] == ((64, 48) if turned % 180 else (48, 64))
    red = torch.rot90(frames.float()[..., 0], -turned // 90, dims=(1, 2))
    assert (red[:, :, :24] - red[:, :, -24:].flip(2) > 10).all()
    assert read_frames(path, start=0, count=2, cover=(24, 24)).shape[1:] == (
        (32, 24, 3) if turned % 180 else (24, 32, 3)
    )
