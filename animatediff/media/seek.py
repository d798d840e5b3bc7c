"""Some frames from the middle of a video file: ffmpeg seeks and decodes only those, and no file can hang it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from animatediff.media.video import require_ffmpeg

TIMEOUT = 60.0  # seconds that ffmpeg may take for one file
PPM_HEADER = re.compile(rb"P6\s(\d+)\s(\d+)\s255\s")


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
    seconds: float  # of the longest stream, which may be the sound; 0 where the header does not say
    variable_rate: bool

    @property
    def frames(self) -> int:
        return round(self.seconds * self.fps)


def probe(path: Path) -> VideoInfo:
    """Read a file's header.

    Raises:
        UnusableVideo: no such file, zero length, no video stream, or nothing that ffmpeg can read.
    """
    if not path.is_file():
        raise UnusableVideo("missing")
    if not path.stat().st_size:
        raise UnusableVideo("zero length")
    text = _ffmpeg(["-i", _source(path)]).stderr.decode(errors="replace")
    if "Input #0" not in text:
        raise UnusableVideo("unreadable", _complaint(text))
    streams = [line for line in text.splitlines() if "Stream #" in line and " Video: " in line]
    video = next((line for line in streams if "(attached pic)" not in line), None)
    if video is None:
        raise UnusableVideo("no video stream")
    average, base = _rate(video, "fps"), _rate(video, "tbr")
    if not (fps := average or base):
        raise UnusableVideo("unreadable", "no frame rate")
    duration = re.search(r"Duration: (\d+):(\d+):([\d.]+)", text)
    hours, minutes, seconds = map(float, duration.groups()) if duration else (0.0, 0.0, 0.0)
    variable = bool(average and base) and abs(average - base) > 0.01 * base
    return VideoInfo(fps, 3600 * hours + 60 * minutes + seconds, variable)


def read_frames(path: Path, *, fps: float, start: int, stride: int, count: int, cover: tuple[int, int]) -> Tensor:
    """Frames `start`, `start + stride`, … of a video played at `fps`; fewer than `count` where it ends before.

    A file of variable rate is first resampled in time to the constant rate `fps`.

    Args:
        path: of the file.
        fps: frames per second, the file's own as `probe` gives it.
        start, stride, count: in frames of that rate.
        cover: height and width in pixels; pictures are scaled, in proportion, to the smallest that covers both.

    Returns:
        uint8 (n, H, W, 3) with n <= count, H >= cover[0], W >= cover[1] and one of them equal.

    Raises:
        UnusableVideo: ffmpeg cannot decode the file, or needs too long.
    """
    height, width = cover
    filters = [
        f"setpts=PTS-STARTPTS+0.5/({fps:.6g}*TB)",  # every frame in the middle of its slot: no rounding moves it
        f"fps={fps:.6g}:round=down",
        f"framestep={stride}",
        f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=bicubic",
    ]
    seek = ["-ss", f"{(start - 0.5) / fps:.6f}"] if start else []
    result = _ffmpeg(
        ["-v", "error", *seek, "-i", _source(path), "-map", "0:V:0", "-vf", ",".join(filters)]
        + ["-frames:v", str(count), "-f", "image2pipe", "-c:v", "ppm", "-"]
    )
    frames = _parse_ppm(result.stdout)
    if result.returncode and len(frames) < count:
        raise UnusableVideo("unreadable", _complaint(result.stderr.decode(errors="replace")))
    if len({frame.shape for frame in frames}) > 1:
        raise UnusableVideo("unreadable", "the picture changes its size")
    return torch.from_numpy(np.stack(frames)) if frames else torch.empty(0, height, width, 3, dtype=torch.uint8)


def _ffmpeg(arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
    command = [require_ffmpeg().get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-threads", "1", *arguments]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise UnusableVideo("unreadable", f"ffmpeg needs more than {TIMEOUT:g} s") from None


def _source(path: Path) -> str:
    return f"file:{path.absolute()}"  # a colon in a name is no protocol


def _rate(stream: str, unit: str) -> float:
    """Frames per second in ffmpeg's line on a stream; 0 where it does not say."""
    found = re.search(rf"([\d.]+)(k?) {unit}\b", stream)
    return float(found[1]) * (1000 if found[2] else 1) if found else 0.0


def _complaint(text: str) -> str:
    """The first of ffmpeg's lines that names an error, without the `[part @ address]` before it."""
    lines = text.strip().splitlines() or [""]
    line = next((line for line in lines if re.search("error|invalid|not found|corrupt", line, re.IGNORECASE)), lines[0])
    return re.sub(r"^(\[[^\]]*\]\s*)+", "", line)


def _parse_ppm(data: bytes) -> list[np.ndarray]:
    frames, position = [], 0
    while header := PPM_HEADER.match(data, position):
        width, height = int(header[1]), int(header[2])
        position = header.end() + 3 * width * height
        if position > len(data):
            break
        frames.append(np.frombuffer(data, np.uint8, 3 * width * height, header.end()).reshape(height, width, 3))
    return frames
