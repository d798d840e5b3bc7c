"""Clips to files and back: GIF, MP4, WebP, or a folder of PNG frames, each carrying the settings that made it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from animatediff.config.clip_formats import LOOPING, check_fps
from animatediff.media.comments import as_exif, comment_of, parse_settings, texts_of
from animatediff.media.gif import write_gif
from animatediff.media.mp4 import write_mp4
from animatediff.media.pictures import WHITE, encode, read_animation, read_info
from animatediff.media.seek import MAX_BYTES, UnusableVideo, pick, probe, read_clip, times
from animatediff.media.sound import Sound
from animatediff.utils import UserError, describe, replacing

GRID_PADDING = 2  # black pixels around every clip of a grid
WEBP_QUALITY = 95
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
DEFAULT_FPS = 8.0  # of pictures that say nothing
MAX_STILL = 1000  # frames that a picture without delays may say it stands for


@dataclass(frozen=True)
class FrameStream:
    """A clip whose frames are made as they are asked for, once: `frames` of them, each uint8 (H, W, 3)."""

    frames: int
    source: Iterator[np.ndarray]


# ---- writing --------------------------------------------------------------------------------------------------


def save_video(
    video: Tensor | np.ndarray | Sequence[Image.Image] | FrameStream,
    path: str | Path,
    fps: float = 8,
    metadata: Mapping[str, Any] | None = None,
    *,
    loop: int = 0,
    sound: Sound | None = None,
) -> Path:
    """Write one clip; the file appears whole or not at all.

    Args:
        video: (f, 3, H, W) or (f, H, W, 3), where both fit, the first is meant; or f images. Floats in [0, 1], rounded
            to 8 bits and clipped; uint8 as it is. MP4s and PNG folders hold one frame of a FrameStream at a time.
        path: ends in .gif, .mp4 or .webp; without an ending it is a folder of PNG frames. Folders above are made.
            An MP4 of odd height or width repeats its last row or column: H.264 players want even sizes.
        fps: frames per second. A GIF's delays are multiples of 10 ms, spread so that the clip's length is right.
        metadata: settings that JSON can hold; `read_metadata` gives them back, with `frames` and `fps` added.
        loop: times that a GIF or WebP is played, 0 for ever.
        sound: of an MP4.

    Returns:
        The path.

    Raises:
        UserError: another shape or ending, values that are not finite, an fps or loop that the format cannot hold,
            what the system refuses.
    """
    path = Path(path)
    if (writer := WRITERS.get(path.suffix)) is None:
        raise UserError(
            f"got {path}, expected a name ending in {', '.join(s for s in WRITERS if s)}, or without an ending for a "
            "folder of PNG frames: rename it"
        )
    form = path.suffix[1:] or "png"
    check_fps(fps, form)
    if not 0 <= loop < 2**16 or (loop and form not in LOOPING):
        raise UserError(f"loop: got {loop} for {form}, expected 0, or for a GIF or WebP the times that it is played")
    if sound and form != "mp4":
        raise UserError(f"got sound for {form}, which holds none, expected mp4")
    streamed = isinstance(video, FrameStream)
    frames = video.source if streamed else to_uint8(video)
    if streamed and path.suffix not in STREAMED:
        frames = np.stack(list(frames))
    count = video.frames if streamed else len(frames)
    comment = json.dumps({**(metadata or {}), "frames": count, "fps": float(fps)}, ensure_ascii=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"got {path} to write to, expected a folder that can be made: {error.strerror}") from None
    options: dict[str, Any] = {"loop": loop} if form in LOOPING else {}
    options |= {"sound": sound} if sound else {}
    with replacing(path) as temporary:
        writer(frames, temporary, float(fps), comment, **options)
    return path


def save_videos_grid(
    videos: Tensor,
    path: str | Path,
    rescale: bool = False,
    n_rows: int = 6,
    fps: float = 8,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write clips side by side, `n_rows` in each row (the official helper's signature).

    Args:
        videos: (b, 3, f, H, W), floats in [0, 1], or in [-1, 1] with `rescale`.
        path, fps, metadata: as for `save_video`.

    Raises:
        UserError: another shape, or what `save_video` refuses.
    """
    if videos.ndim != 5 or videos.shape[1] != 3:
        raise UserError(f"got videos of shape {tuple(videos.shape)}, expected (b, 3, f, H, W)")
    videos = (videos.float() + 1) / 2 if rescale else videos
    return save_video(tile([to_uint8(v.movedim(0, 1)) for v in videos], n_rows), path, fps, metadata)


def tile(videos: Sequence[np.ndarray], n_rows: int = 6) -> np.ndarray:
    """One clip that shows all of them, `n_rows` in each row, with black lines between.

    Smaller clips stand in the middle of a black cell of the largest height and width; shorter ones hold their last
    frame. A single clip is returned as it is.

    Args:
        videos: uint8 clips (f, H, W, 3).

    Raises:
        UserError: no clip, or less than one per row.
    """
    if not videos or n_rows < 1:
        raise UserError(f"got {len(videos)} clips in rows of {n_rows}, expected at least one of each")
    if len(videos) == 1:
        return videos[0]
    frames, height, width = (max(v.shape[axis] for v in videos) for axis in range(3))
    columns = min(n_rows, len(videos))
    rows = -(-len(videos) // columns)
    cell_h, cell_w = height + GRID_PADDING, width + GRID_PADDING
    grid = np.zeros((frames, rows * cell_h + GRID_PADDING, columns * cell_w + GRID_PADDING, 3), np.uint8)
    for i, video in enumerate(videos):
        f, h, w, _ = video.shape
        top = i // columns * cell_h + GRID_PADDING + (height - h) // 2
        left = i % columns * cell_w + GRID_PADDING + (width - w) // 2
        grid[:f, top : top + h, left : left + w] = video
        grid[f:, top : top + h, left : left + w] = video[-1]
    return grid


def to_uint8(video: Tensor | np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    """A clip as uint8 (f, H, W, 3): floats in [0, 1] are clipped and rounded to the nearest of 256 levels.

    Args:
        video: (f, 3, H, W) or (f, H, W, 3), floating or uint8; or its frames, as a pipeline gives them.

    Raises:
        UserError: another shape or dtype, no frame, or values that are not finite.
    """
    try:
        if isinstance(video, (list, tuple)):
            video = np.stack([np.asarray(f.convert("RGB") if isinstance(f, Image.Image) else f) for f in video])
        video = torch.as_tensor(video).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"got {describe(video)}, expected a clip: a tensor, an array or images of one size") from None
    if video.ndim != 4 or 3 not in (video.shape[1], video.shape[-1]) or not video.numel():
        raise UserError(f"got a video of shape {tuple(video.shape)}, expected (f, 3, H, W) or (f, H, W, 3)")
    if video.shape[1] == 3:
        video = video.movedim(1, -1)
    if video.is_floating_point():
        if not bool(video.isfinite().all()):
            raise UserError("got a video with values that are not finite: the network overflowed, try float32")
        video = (video.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if video.dtype != torch.uint8:
        raise UserError(f"got a video of {video.dtype}, expected floats in [0, 1] or uint8")
    return video.contiguous().numpy()


# ---- reading --------------------------------------------------------------------------------------------------


def read_video(
    path: str | Path,
    *,
    most: int | None = None,
    start: int = 0,
    stride: int = 1,
    fps: float | None = None,
    background: int = WHITE,
) -> tuple[Tensor, float]:
    """Frames (f, H, W, 3) uint8 and frames per second of a file or folder that `save_video` wrote, or of another one.

    Of other files, the frame shown for the shortest time sets the speed, and one shown for longer is repeated; a
    folder of pictures from elsewhere has 8 frames per second, and a picture is a clip of one frame.

    Args:
        path: what libav or Pillow reads, or a folder of pictures, which are taken in the order of `list_pictures`.
        most: frames to read; by default all.
        start: frames at the beginning, at the file's own speed, that are passed over.
        stride: every how many-th frame is taken; the clip takes as long and has fewer frames per second.
        fps: frames per second to read the file at, so that its first second stays a second; by default its own.
        background: gray level, 0 to 255, behind what is transparent.

    Raises:
        UserError: no such file, one that cannot be read, is cut off or too large, no frames, frames of different sizes.
    """
    path = Path(path)
    chosen = {"fps": fps, "start": start, "stride": stride}
    if path.suffix.lower() in VIDEO_SUFFIXES:
        with _as_user_error(path):
            frames, own = read_clip(path, count=most, **chosen)
    else:
        shown, own = _read_pictures(path, background, None if fps or most is None else start + most * stride)
        room = MAX_BYTES // shown[0][2].nbytes
        found = list(itertools.islice(pick(shown, times(own, **chosen)), room + 1 if most is None else most))
        if len(found) > room:
            raise UserError(f"got {path} with more than {room} frames, {MAX_BYTES >> 30} GiB: read fewer of them")
        frames = torch.from_numpy(np.stack(found)) if found else torch.empty(0)
    if not len(frames):
        raise UserError(f"got {path}, in which there are no frames from number {start} on: check the file")
    return frames, (fps or own) / stride


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The settings in a file or PNG folder that `save_video` wrote; empty where there are none.

    What is of another type than `save_video` and the pipeline write, or out of all range, is left out.

    Raises:
        UserError: no such file, or none that can be read.
    """
    path = _first_file(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        with _as_user_error(path):
            return parse_settings(probe(path).comment)
    return parse_settings(comment_of(read_info(path)))


def read_texts(path: str | Path) -> dict[str, str]:
    """All that a picture, a clip or a PNG folder says in words, whoever wrote it, by name: a stranger's texts.

    Raises:
        UserError: as `read_metadata`.
    """
    path = _first_file(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        with _as_user_error(path):
            return texts_of(probe(path).texts)
    return texts_of(read_info(path))


def _first_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        return path
    if frames := sorted(path.glob("*.png")):
        return frames[0]
    made = sorted((path / "sample").glob("*"), key=by_numbers)  # of the folder of a run
    such = f", such as {made[0]}" if made else ""
    raise UserError(f"got {path}, a folder without PNG frames, expected a clip{such}")


def is_complete(path: str | Path) -> bool:
    """Whether a clip that `save_video` wrote is there, undamaged, with all of its frames."""
    try:
        return len(read_video(path)[0]) == read_metadata(path).get("frames")
    except UserError:
        return False


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, in the order of `by_numbers`.

    Raises:
        UserError: it holds none.
    """
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES), key=by_numbers)
    if not files:
        raise UserError(f"got the folder {folder}, which holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return files


def by_numbers(path: Path) -> tuple[list[tuple[str, int]], str]:
    """What files are sorted by: 9.png before 10.png."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", path.name)], path.name


def _read_pictures(
    path: Path, background: int, limit: int | None
) -> tuple[list[tuple[float, float, np.ndarray]], float]:
    """At most `limit` frames, each with the times from and until which it is shown, and frames per second."""
    files = list_pictures(path) if path.is_dir() else [path]
    animations = itertools.chain.from_iterable(read_animation(file, background=background) for file in files)
    frames, delays, settings = [], [], {}
    for frame, info in itertools.islice(animations, limit):
        settings = settings if frames else parse_settings(comment_of(info))
        frames.append(frame)
        delays.append(float(info.get("duration", 0)))  # milliseconds
        if frame.shape != frames[0].shape:
            sizes = " and ".join(f"{w}x{h}" for h, w, _ in sorted((frames[0].shape, frame.shape)))
            raise UserError(f"got {path} with frames of {sizes} pixels, expected one size: crop them first")
        if len(frames) * frame.nbytes > MAX_BYTES:
            raise UserError(f"got {path} with more than {len(frames) - 1} frames, {MAX_BYTES >> 30} GiB: read fewer")
    counts, fps = _durations(delays, settings, still=path.suffix.lower() == ".webp", partial=len(frames) == limit)
    ends = [count / fps for count in itertools.accumulate(counts)]
    return list(zip([0.0, *ends], ends, frames, strict=False)), fps


def _durations(
    delays: Sequence[float], settings: Mapping[str, Any], *, still: bool, partial: bool
) -> tuple[list[int], float]:
    """For how many frames each picture stands, and frames per second.

    Settings are believed where the delays, in milliseconds, bear them out, and where there are none.
    """
    fps, frames = settings.get("fps"), settings.get("frames", 1)
    if not 0 < min(delays) <= max(delays) < math.inf:
        alone = still and len(delays) == 1 and frames <= MAX_STILL  # a WebP that stands still is a single picture
        return [frames] if alone else [1] * len(delays), fps or DEFAULT_FPS
    for rate in (fps, 1000 / min(delays)):
        counts = [max(round(delay * rate / 1000), 1) for delay in delays] if rate else []
        if sum(counts) == frames or (partial and 0 < sum(counts) < frames):
            break
    return counts, rate


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except UnusableVideo as problem:
        raise UserError(f"got {path}, expected a video: {problem}") from None


# ---- formats --------------------------------------------------------------------------------------------------


def _delays(frames: np.ndarray, fps: float, unit: int) -> int | list[int]:
    """Milliseconds, multiples of `unit`, that each frame is shown: spread so that the clip's length is right."""
    ends = np.round(np.arange(len(frames) + 1) * 1000 / fps / unit).astype(int) * unit
    delays = np.diff(ends).tolist()
    return delays if len(delays) > 1 else delays[0]


def _write_gif(frames: np.ndarray, path: Path, fps: float, comment: str, loop: int) -> None:
    again = {} if loop == 1 else {"loop": max(loop - 1, 0)}  # the file says how often it is repeated, 0 for ever
    write_gif(frames, path, duration=_delays(frames, fps, 10), comment=comment.encode("ascii"), **again)


def _write_webp(frames: np.ndarray, path: Path, fps: float, comment: str, loop: int) -> None:
    options = {"duration": _delays(frames, fps, 1), "loop": loop, "quality": WEBP_QUALITY, "exif": as_exif(comment)}
    path.write_bytes(encode(frames, ".webp", is_batch=True, **options))


def _write_png(frames: Iterable[np.ndarray], path: Path, fps: float, comment: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", comment)
    path.mkdir()
    for i, frame in enumerate(frames):
        (path / f"{i:04d}.png").write_bytes(encode(frame, ".png", pnginfo=text))


STREAMED = (".mp4", "")  # formats that take one frame after the other; a GIF's palette is that of all frames
WRITERS: dict[str, Callable[..., None]] = {
    ".gif": _write_gif,
    ".mp4": write_mp4,
    ".webp": _write_webp,
    "": _write_png,
}
