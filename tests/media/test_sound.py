"""The sound of one file in another one: the same packets, from the right time on, as long as the frames."""

import wave
from pathlib import Path

import av
import pytest

from animatediff.media.sound import Sound, check_sound
from animatediff.media.video import read_video, save_video
from animatediff.utils import UserError
from tests.media.videos import encode, numbered


def packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(stream) if p.size]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("sound") / "tone.mp4", range(25), fps=25, sound=2)


def test_packets_are_copied_and_end_with_the_frames(source, tmp_path):
    save_video(numbered(10), tmp_path / "a.mp4", 10, sound=Sound(source))
    copied, true = packets(tmp_path / "a.mp4"), packets(source)
    assert [data for _, data in copied] == [data for _, data in true[: len(copied)]]
    assert copied[-1][0] < 1 <= copied[-1][0] + 1024 / 44100 * 1.5
    assert len(read_video(tmp_path / "a.mp4")[0]) == 10


def test_from_another_time_on(source, tmp_path):
    save_video(numbered(5), tmp_path / "a.mp4", 10, sound=Sound(source, start=0.8))
    copied, true = packets(tmp_path / "a.mp4"), [p for p in packets(source) if p[0] >= 0.8]
    assert [data for _, data in copied] == [data for _, data in true[: len(copied)]]
    assert copied[0][0] == pytest.approx(0, abs=0.03)


def test_refusals(source, tmp_path):
    silent = encode(tmp_path / "silent.mp4", range(3))
    with pytest.raises(UserError, match="silent.mp4, which has no sound"):
        check_sound(silent)
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="x.mp4, expected a video or a file with sound"):
        check_sound(tmp_path / "x.mp4")
    with wave.open(str(tmp_path / "pcm.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    with pytest.raises(UserError, match="pcm.wav with sound in pcm_s16le, expected one that MP4 holds"):
        check_sound(tmp_path / "pcm.wav")
    with pytest.raises(UserError, match="got sound for gif"):
        save_video(numbered(3), tmp_path / "a.gif", 10, sound=Sound(source))
