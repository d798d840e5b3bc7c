"""The sound of one file into another one: packets are copied as they are, nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from animatediff.media.seek import OPTIONS, TIMEOUT
from animatediff.utils import UserError

SOUND_FORMATS = "mp3,aac,wav,flac,ogg"  # beside those of video
MP4_CODECS = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")  # what players of MP4 know


@dataclass(frozen=True)
class Sound:
    """The sound of a file from `start` seconds on."""

    path: Path
    start: float = 0.0


def check_sound(path: Path) -> None:
    """Raises: UserError for a file without sound, or with sound that an MP4 cannot hold."""
    with open_sound(path):
        pass


@contextmanager
def open_sound(path: Path) -> Iterator[Any]:
    """The first stream of sound of a file.

    Raises:
        UserError: as `check_sound`.
    """
    import av

    if not path.is_file():
        raise UserError(f"got {path}, which is no file, expected a video or a file with sound: check the path")
    options = OPTIONS | {"format_whitelist": f"{OPTIONS['format_whitelist']},{SOUND_FORMATS}"}
    try:
        container = av.open(f"file:{path.absolute()}", options=options, metadata_errors="replace", timeout=TIMEOUT)
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"got {path}, expected a video or a file with sound: {reason}") from None
    with container:
        if not container.streams.audio:
            raise UserError(f"got {path}, which has no sound: leave finish.audio out, or name a file that has some")
        stream = container.streams.audio[0]
        codec = stream.codec_context.name if stream.codec_context else "an unknown codec"
        if (codec := codec.removesuffix("float")) not in MP4_CODECS:
            raise UserError(
                f"got {path} with sound in {codec}, expected one that MP4 holds ({', '.join(MP4_CODECS)}): convert it, "
                f"such as by ffmpeg -i {path.name} -c:v copy -c:a aac {path.stem}.mp4"
            )
        yield stream


class SoundTrack:
    """The copy of a stream of sound in an MP4 that is being written."""

    def __init__(self, source: Any, start: float, target: Any):
        self.target, self.stream = target, target.add_stream_from_template(source)
        self.shift = round(start / source.time_base)
        self.unit = float(source.time_base)
        packets = (p for p in source.container.demux(source) if p.pts is not None)
        if self.shift:  # else what comes before 0, by which some decoders get ready, goes along
            packets = (p for p in packets if p.pts >= self.shift)
        self.packets, self.held = packets, None

    def write(self, until: float) -> None:
        """Write what sounds before `until` seconds and is not written yet."""
        while (packet := self.held or next(self.packets, None)) is not None:
            if (packet.pts - self.shift) * self.unit >= until:
                self.held = packet
                return
            packet.pts -= self.shift
            packet.dts = packet.pts
            packet.stream, self.held = self.stream, None
            self.target.mux(packet)
