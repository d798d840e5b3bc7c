"""Training clips from captioned video files: a list or folder in, an endless reproducible series of clips out."""

from __future__ import annotations

import csv
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from animatediff.config.request import MAX_SIDE
from animatediff.config.settings import Int, Many, opt, options
from animatediff.media.seek import UnusableVideo, VideoInfo, probe, read_frames
from animatediff.training.data.virtual_camera import CAMERA_MOVES, margin_size, move_camera
from animatediff.utils import UserError, describe

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
Log = Callable[[str], None]


@options
class ClipConfig:
    """Which videos, and which part of them is a clip. The names are the official training YAML's `train_data`."""

    csv_path: str = opt("", ".csv with videoid,name (WebVid) or path,caption; .jsonl with path and caption")
    video_folder: str = opt("", "what paths in the list start from; without a list, every video with a .txt beside it")
    sample_size: Many[Int] = opt((256,), "pixels: the side of a square, or height and width", min_length=1)
    sample_stride: Int = opt(4, "every 4th frame of the file", ge=1)
    sample_n_frames: Int = opt(16, "frames of a clip", ge=1)
    crop: Literal["center", "random"] = opt("center", "which part of a frame")
    flip: bool = opt(False, "mirror half of the clips; not where captions tell left from right")
    camera: str = opt("", "a key of CAMERA_MOVES: a camera that moves over ordinary clips, to train MotionLoRAs")

    def __post_init__(self) -> None:
        if not (self.csv_path or self.video_folder):
            raise UserError("got neither csv_path nor video_folder, expected one: say where the videos are")
        check_size(self.sample_size)
        if self.camera and self.camera not in CAMERA_MOVES:
            raise UserError(f"camera: got {self.camera!r}, expected one of {', '.join(CAMERA_MOVES)}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a clip in pixels."""
        return self.sample_size[0], self.sample_size[-1]

    @property
    def span(self) -> int:
        """Frames of a file from a clip's first to its last."""
        return (self.sample_n_frames - 1) * self.sample_stride + 1


@dataclass(frozen=True)
class CaptionedVideo:
    path: Path
    caption: str | None  # None where there should be one and is not


@dataclass(frozen=True)
class ScanReport:
    """What can be used of a set of files."""

    kind: str  # what they are: videos, pictures
    total: int
    unusable: list[tuple[Path, UnusableVideo]]
    variable_rate: list[Path]  # usable: resampled to their average rate

    @property
    def usable(self) -> int:
        return self.total - len(self.unusable)

    def __str__(self) -> str:
        lines = [f"{self.usable} of {self.total} {self.kind} can be used"]
        for reason in sorted({problem.reason for _, problem in self.unusable}):
            named = [(path, problem) for path, problem in self.unusable if problem.reason == reason]
            lines.append(f"{reason}: {len(named)}")
            lines += [f"  {path}" + (f" ({p.detail})" if p.detail else "") for path, p in named]
        if self.variable_rate:
            lines.append(f"used, resampled from a variable frame rate: {len(self.variable_rate)}")
            lines += [f"  {path}" for path in self.variable_rate]
        return "\n".join(lines)


def check_size(size: tuple[int, ...]) -> None:
    """Raises: UserError where it is no side, and no height and width, in pixels."""
    if len(size) > 2 or min(size) < 1 or max(size) > MAX_SIDE:
        raise UserError(
            f"sample_size: got {describe(size) if len(size) > 2 else size}, expected a side, or height and width, of 1 "
            f"to {MAX_SIDE} pixels"
        )


class Clip(NamedTuple):
    """What a `Series` has at an index."""

    pixels: Tensor | None  # (f, 3, h, w) in [-1, 1]; None where none of the files gives a clip
    caption: str
    path: str  # the file that it is from
    left_out: dict[str, str]  # files in whose place it came, and what is the matter with them, where they were new


class Series(ABC, Dataset):
    """An endless series of clips in which every file comes once before any comes again.

    Clip `index`, 0 and up, is a function of (seed, index) and the files alone, whichever process asks for it and in
    which order. A file that gives no clip is left out and the next one in the series takes its place.

    Args:
        files: what clips are made from.
        seed: of the order, and of what is drawn for a clip.
    """

    kind = "files"
    nothing = "clip"  # what none of the files gives, for a message

    def __init__(self, files: list[CaptionedVideo], *, seed: int):
        self.files, self.seed = files, seed
        self._unusable: set[int] = set()

    def __getitem__(self, index: int) -> Clip:
        left_out = {}
        for attempt, number in enumerate(self._order(index)):
            if number in self._unusable:
                continue
            file = self.files[number]
            try:
                pixels = self._draw(file, np.random.default_rng((self.seed, index, attempt)))
                return Clip(pixels, file.caption or "", str(file.path), left_out)
            except UnusableVideo as problem:
                self._unusable.add(number)
                left_out[str(file.path)] = str(problem)
        return Clip(None, "", "", left_out)

    def scan(self, *, threads: int = 4, log: Log = print) -> ScanReport:
        """Look at every file; `log` is told how far it is."""

        def look(file: CaptionedVideo) -> bool | UnusableVideo:
            try:
                return self._look(file)
            except UnusableVideo as problem:
                return problem

        unusable, variable = [], []
        with ThreadPoolExecutor(threads) as pool:
            for i, (file, result) in enumerate(zip(self.files, pool.map(look, self.files), strict=True)):
                if isinstance(result, UnusableVideo):
                    unusable.append((file.path, result))
                elif result:
                    variable.append(file.path)
                if i and i % 1000 == 0:
                    log(f"looked at {i} of {len(self.files)} {self.kind}")
        return ScanReport(self.kind, len(self.files), unusable, variable)

    def _order(self, index: int) -> Iterator[int]:
        """The file of clip `index`, and those that would take its place."""
        epoch, place = divmod(index, len(self.files))
        order = _shuffled(self.seed, epoch, len(self.files))
        return (int(order[(place + attempt) % len(order)]) for attempt in range(len(order)))

    @abstractmethod
    def _draw(self, file: CaptionedVideo, rng: np.random.Generator) -> Tensor:
        """Raises: UnusableVideo."""

    @abstractmethod
    def _look(self, file: CaptionedVideo) -> bool:
        """Whether its frame rate varies. Raises: UnusableVideo."""


class Clips(Series):
    """Clips of video files: a `Series`.

    Args:
        config: which videos, and which part of them.
        seed: of the order, the starts, crops and flips.

    Raises:
        UserError: the list or folder is missing, broken or empty.
    """

    kind = "videos"

    def __init__(self, config: ClipConfig, *, seed: int = 0):
        super().__init__(list_videos(config), seed=seed)
        self.config = config
        self.nothing = f"clip of {config.span} frames"

    def _look(self, video: CaptionedVideo) -> bool:
        """Read the header and the last possible clip."""
        info = self._check(video)
        self._read(video.path, info, max(info.frames - self.config.span, 0), self.config.size)
        return info.variable_rate

    def _draw(self, video: CaptionedVideo, rng: np.random.Generator) -> Tensor:
        config, (h, w) = self.config, self.config.size
        box = margin_size((h, w)) if config.camera else (h, w)
        info = self._check(video)
        start = int(rng.integers(max(info.frames - config.span, 0) + 1))
        frames = self._read(video.path, info, start, box)
        room = (frames.shape[1] - box[0], frames.shape[2] - box[1])
        top, left = (int(rng.integers(r + 1)) if config.crop == "random" else r // 2 for r in room)
        frames = frames[:, top : top + box[0], left : left + box[1]]
        if config.flip and rng.random() < 0.5:
            frames = frames.flip(2)
        pixels = rearrange(frames, "f h w c -> f c h w").contiguous().float() / 127.5 - 1
        return move_camera(pixels, config.camera, (h, w)) if config.camera else pixels

    @staticmethod
    def _check(video: CaptionedVideo) -> VideoInfo:
        if video.caption is None:
            raise UnusableVideo("no caption")
        return probe(video.path)

    def _read(self, path: Path, info: VideoInfo, start: int, cover: tuple[int, int]) -> Tensor:
        """The clip from frame `start`, or from frame 0 where the pictures end sooner than the header says."""
        config, frames = self.config, None
        for first in sorted({start, 0}, reverse=True):
            frames = read_frames(
                path,
                fps=info.fps,
                start=first,
                stride=config.sample_stride,
                count=config.sample_n_frames,
                cover=cover,
            )
            if len(frames) == config.sample_n_frames:
                return frames
        assert frames is not None
        raise UnusableVideo(
            "too short", f"{len(frames)} of {config.sample_n_frames} frames at stride {config.sample_stride}"
        )


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


# ---- lists ----------------------------------------------------------------------------------------------------


def list_videos(config: ClipConfig) -> list[CaptionedVideo]:
    """The videos of a CSV, a JSONL or a folder, in that order; whether they are there is not looked at.

    Raises:
        UserError: the list or folder is missing, broken or empty.
    """
    if config.csv_path:
        where, videos = config.csv_path, list(_read_list(config))
    else:
        where, videos = config.video_folder, list(_read_folder(Path(config.video_folder)))
    if not videos:
        raise UserError(f"got {where} without a video, expected at least one: {', '.join(VIDEO_ENDINGS)} with captions")
    return videos


def _read_folder(folder: Path) -> Iterator[CaptionedVideo]:
    if not folder.is_dir():
        raise UserError(f"got video_folder {folder}, which is no folder: check the path")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_ENDINGS:
            yield CaptionedVideo(path, read_caption(path))


def read_caption(path: Path) -> str | None:
    """The text in the .txt beside a file, None where there is none.

    Raises:
        UserError: it is not UTF-8.
    """
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    return _checked(text.read_text(encoding="utf-8-sig", errors="surrogateescape").strip(), f"{text}, which")


def _checked(text: str, where: str) -> str:
    """Text of a file that was read with its other bytes as surrogates."""
    if bad := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        byte = f" (byte {ord(bad) - 0xDC00:#04x})" if "\udc80" <= bad <= "\udcff" else ""
        raise UserError(f"got {where} is not UTF-8 text{byte}, expected UTF-8: save it again as that")
    return text


def _read_list(config: ClipConfig) -> Iterator[CaptionedVideo]:
    path = Path(config.csv_path)
    if not path.is_file():
        raise UserError(f"got csv_path {path}, which is no file: check the path")
    folder = Path(config.video_folder) if config.video_folder else path.parent
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _json_rows(path, file) if path.suffix.lower() == ".jsonl" else _csv_rows(path, file)
        for number, row in enumerate(rows, 1):
            name, caption = (f"{row['videoid']}.mp4", row.get("name")) if row.get("videoid") else _path_row(row)
            if not name:
                raise UserError(
                    f"got {path} with row {number} of {', '.join(map(str, row)) or 'nothing'}, expected videoid and "
                    "name (WebVid), or path and caption: rename the columns"
                )
            name, caption = (
                None if text is None else _checked(str(text), f"{path} whose row {number}") for text in (name, caption)
            )
            yield CaptionedVideo(folder / name, caption)


def _path_row(row: dict) -> tuple[str | None, str | None]:
    return row.get("path"), row.get("caption")


def _csv_rows(path: Path, lines) -> Iterator[dict]:
    read = 0
    try:
        for row in csv.DictReader(lines):
            yield row
            read += 1
    except csv.Error as error:
        raise UserError(
            f"got {path} whose row {read + 1} is no CSV ({error}): shorten its caption, or close its quotes"
        ) from None


def _json_rows(path: Path, lines) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise UserError(f"got {path} whose line {number} is no JSON ({reason:.100}): correct it") from None
        if not isinstance(row, dict):
            raise UserError(f"got {path} whose line {number} is no JSON object, expected path and caption: correct it")
        yield row
