"""Frames out of video files, from anywhere in them, by libav: no file opens another one, and none can hang it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT = 60.0  # seconds that one call may take for one file
MAX_PIXELS = 2**25  # of a frame: 8K; decoders hold up to 16 of them
MAX_BYTES = 2**31  # of a clip: 340 frames of 1920 x 1080
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,matroska,webm,avi,gif,mpegts,flv"}
SCALER = 4 | 1 << 13 | 1 << 18  # swscale's BICUBIC, FULL_CHR_H_INT and ACCURATE_RND: 0.9 dB over BICUBIC alone


class UnusableVideo(Exception):
    """A file that gives no clip.

    Attributes:
        reason: a few words that are the same for all such files.
        detail: what is the matter with this one, or "".
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header says of its video stream."""

    fps: float  # on average
    seconds: float  # 0 where the header does not say
    variable_rate: bool
    comment: str
    texts: dict[str, str] = field(default_factory=dict)  # all that it says in words, by name

    @property
    def frames(self) -> int:
        return round(self.seconds * self.fps)


def probe(path: Path) -> VideoInfo:
    """Read a file's header.

    Raises:
        UnusableVideo: no such file, zero length, no video stream, or nothing that can be read.
    """
    return _in_time(lambda: _probe(path))


def read_frames(
    path: Path,
    *,
    fps: float | None = None,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    cover: tuple[int, int] | None = None,
) -> Tensor:
    """Frames of a video: those shown at times `start` / its own rate + i `stride` / `fps`, for i = 0, 1, …

    Args:
        path: of the file.
        fps: frames per second, by default the file's own. Where frames are shown longer than that, they are repeated.
        start: frames, at the file's own rate, that are passed over.
        stride: every how many-th frame of that rate is taken.
        count: frames at most; the video may end before. By default all.
        cover: height and width in pixels; pictures are scaled, in proportion, to the smallest that covers both. By
            default they keep their size.

    Returns:
        uint8 (n, H, W, 3) with n <= count; where `cover` is given, H >= cover[0], W >= cover[1] and one of them equal.

    Raises:
        UnusableVideo: the file cannot be decoded, is cut off, too large, or needs too long.
    """
    return _in_time(lambda: _read(path, fps, start, stride, count, cover))[0]


def read_clip(path: Path, *, fps: float | None, start: int, stride: int, count: int | None) -> tuple[Tensor, float]:
    """As `read_frames`, and the file's own frames per second."""
    return _in_time(lambda: _read(path, fps, start, stride, count, None))


def pick(frames: Iterable[tuple[float, float, T]], times: Iterable[float]) -> Iterator[T]:
    """What is shown at some times, ascending, of frames that are shown from one time to another (both in order)."""
    upcoming = iter(times)
    wanted = next(upcoming, None)
    for _, end, frame in frames:
        while wanted is not None and wanted < end:
            yield frame
            wanted = next(upcoming, None)
        if wanted is None:
            return


def times(own_fps: float, *, fps: float | None, start: int, stride: int) -> Iterator[float]:
    """The times of `read_frames`, each a little later, so that rounded timestamps make no difference."""
    tolerance = 0.45 / max(own_fps, fps or 0)  # nearly to the middle; the middle itself would be a matter of rounding
    return (start / own_fps + i * stride / (fps or own_fps) + tolerance for i in itertools.count())


# ---- inside ---------------------------------------------------------------------------------------------------


def _in_time(work: Callable[[], T]) -> T:
    """Do it in a thread, which is left behind when it takes too long: nothing else ends a decoder's endless loop."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout=TIMEOUT)
    except TookTooLong:
        raise UnusableVideo("unreadable", f"it takes more than {TIMEOUT:g} s") from None


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream of a file; what libav has to complain about becomes UnusableVideo."""
    import av

    if not path.is_file():  # nor a named pipe, whose first byte may never come
        raise UnusableVideo("missing")
    if not path.stat().st_size:
        raise UnusableVideo("zero length")
    try:
        name = f"file:{path.absolute()}"  # a colon in a name is no protocol
        with av.open(name, options=OPTIONS, metadata_errors="replace", timeout=TIMEOUT) as container:
            attached = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & attached), None)
            if stream is None:
                raise UnusableVideo("no video stream")
            if stream.codec_context is None or not (stream.average_rate or stream.base_rate):
                raise UnusableVideo("unreadable", "no decoder" if stream.codec_context is None else "no frame rate")
            stream.codec_context.thread_count = 1  # callers have threads of their own
            yield container, stream
    except (av.FFmpegError, ValueError, ArithmeticError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnusableVideo("unreadable", reason) from None


def _probe(path: Path) -> VideoInfo:
    with _open(path) as (container, stream):
        average, base = float(stream.average_rate or 0), float(stream.base_rate or 0)
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / 1e6
        variable = bool(average and base) and abs(average - base) > 0.01 * base
        texts = dict(container.metadata)
        return VideoInfo(average or base, seconds, variable, texts.get("comment", ""), texts)


def _read(
    path: Path, fps: float | None, start: int, stride: int, count: int | None, cover: tuple[int, int] | None
) -> tuple[Tensor, float]:
    found: list[np.ndarray] = []
    with _open(path) as (container, stream):
        own = float(stream.average_rate or stream.base_rate)
        wanted = times(own, fps=fps, start=start, stride=stride)
        if start:
            container.seek(math.floor((start - 0.5) / own / stream.time_base) + (stream.start_time or 0), stream=stream)
        last = None
        for frame in itertools.islice(pick(_decode(container, stream, own), wanted), count):
            found.append(found[-1] if frame is last else _rgb(frame, cover))
            last = frame
            if len({picture.shape for picture in (found[0], found[-1])}) > 1:
                raise UnusableVideo("unreadable", "the picture changes its size")
            if len(found) * found[0].nbytes > MAX_BYTES:
                raise UnusableVideo("too long", f"more than {len(found) - 1} frames, {MAX_BYTES >> 30} GiB")
        if not found:
            height, width = cover or (stream.height, stream.width)
            return torch.empty(0, height, width, 3, dtype=torch.uint8), own
    return torch.from_numpy(np.stack(found)), own


def _decode(container: Any, stream: Any, fps: float) -> Iterator[tuple[float, float, Any]]:
    """Frames with the times, in seconds from the video's beginning, from and until which each is shown.

    Raises:
        UnusableVideo: a frame is damaged, or the file ends sooner than its header says.
    """
    deadline = time.monotonic() + TIMEOUT
    origin, unit = stream.start_time or 0, float(stream.time_base)
    held, begin, end = None, 0.0, 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnusableVideo("damaged", "it is cut off")
        if stream.width * stream.height > MAX_PIXELS:
            raise UnusableVideo("unreadable", f"{stream.width}x{stream.height} pixels, more than {MAX_PIXELS}")
        for frame in packet.decode():
            if time.monotonic() > deadline:
                raise TookTooLong
            shown = end if frame.pts is None else (frame.pts - origin) * unit
            if held is not None:
                yield begin, shown, held
            if frame.is_corrupt:
                raise UnusableVideo("damaged", f"at {shown:.2f} s")
            held, begin = frame, shown
            end = shown + ((frame.duration or 0) * unit or 1 / fps)
    if stream.duration and end + 2 / fps < 0.99 * float(stream.duration * stream.time_base):
        raise UnusableVideo("damaged", f"it is cut off after {end:.2f} s")
    if held is not None:
        yield begin, end, held


def _rgb(frame: Any, cover: tuple[int, int] | None) -> np.ndarray:
    """uint8 (H, W, 3), turned as the camera was held."""
    turns = round(frame.rotation / 90) % 4
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    if cover:
        scale = max(cover[0] / height, cover[1] / width)
        height, width = (max(least, round(scale * side)) for least, side in zip(cover, (height, width), strict=True))
    if turns % 2:
        height, width = width, height
    converted = frame.reformat(width, height, format="rgb24", interpolation=SCALER, threads=1)
    return np.rot90(converted.to_ndarray(), turns)
