"""Clips to files and back: GIF, MP4, WebP, or a folder of PNG frames, each carrying the settings that made it."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from animatediff.media.gif import write_gif
from animatediff.utils import UserError, replacing

GRID_PADDING = 2  # black pixels around every clip of a grid
EXIF_USER_COMMENT = 0x9286
EXIF_SUB_FOLDER = 0x8769
ASCII_CODE = b"ASCII\0\0\0"  # how an EXIF user comment starts
H264_CRF = "12"  # visually lossless
WEBP_QUALITY = 95
FFMPEG_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class FrameStream:
    """A clip whose frames are made as they are asked for, once: `frames` of them, each uint8 (H, W, 3)."""

    frames: int
    source: Iterator[np.ndarray]


# ---- public functions -----------------------------------------------------------------------------------------


def save_video(
    video: Tensor | np.ndarray | FrameStream,
    path: str | Path,
    fps: float = 8,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write one clip; the file appears whole or not at all.

    Args:
        video: (f, 3, H, W) or (f, H, W, 3); where both fit, the first is meant. Floats in [0, 1], rounded to 8 bits
            and clipped; uint8 as it is. MP4s and PNG folders hold no more than a frame of a FrameStream in memory.
        path: ends in .gif, .mp4 or .webp; without an ending it is a folder of PNG frames. Folders above are made.
            An MP4 of odd height or width repeats its last row or column: H.264 players want even sizes.
        fps: frames per second. A GIF's delays are multiples of 10 ms, spread so that the clip's length is right.
        metadata: settings that JSON can hold; `read_metadata` gives them back, with `frames` and `fps` added.

    Returns:
        The path.

    Raises:
        UserError: another shape or ending, values that are not finite, an fps that the format cannot show.
    """
    path = Path(path)
    if not fps > 0:
        raise UserError(f"got fps {fps}, expected a number above 0")
    if (writer := WRITERS.get(path.suffix)) is None:
        raise UserError(
            f"got {path}, expected a name ending in {', '.join(s for s in WRITERS if s)}, or without an ending for a "
            "folder of PNG frames: rename it"
        )
    streamed = isinstance(video, FrameStream)
    frames = video.source if streamed else to_uint8(video)
    if streamed and path.suffix not in STREAMED:
        frames = np.stack(list(frames))
    count = video.frames if streamed else len(frames)
    comment = json.dumps({**(metadata or {}), "frames": count, "fps": float(fps)}, ensure_ascii=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        writer(frames, temporary, float(fps), comment)
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


def read_video(path: str | Path, *, most: int | None = None) -> tuple[Tensor, float]:
    """Frames (f, H, W, 3) uint8 and frames per second of a file or folder that `save_video` wrote, or of another one.

    Of other files, the frame shown for the shortest time sets the speed, and one shown for longer is repeated; a
    folder of pictures from elsewhere has 8 frames per second, and a picture is a clip of one frame.

    Args:
        path: what ffmpeg or Pillow reads, or a folder of pictures, which are taken in the order of their names.
        most: frames to read, from the first on; by default all.

    Raises:
        UserError: no such file, one that cannot be read, no frames, or frames of different sizes.
    """
    path = Path(path)
    if path.suffix.lower() in FFMPEG_SUFFIXES:
        return _read_mp4(path, most)
    files = list_pictures(path) if path.is_dir() else [path]
    saved = read_metadata(files[0])
    frames, delays = [], []
    for file in files[:most]:
        with _open_image(file) as image, _decoding(file):
            for frame in itertools.islice(ImageSequence.Iterator(image), most):
                frames.append(np.asarray(ImageOps.exif_transpose(frame).convert("RGB")))
                delays.append(float(frame.info.get("duration", 0)))
    if len(sizes := {frame.shape[1::-1] for frame in frames}) > 1:
        raise UserError(f"got {path} with frames of {_listed(sizes)} pixels, expected one size: crop them first")
    fps = float(saved.get("fps") or (1000 / min(delays) if min(delays) else 8))
    counts = [max(round(delay * fps / 1000), 1) for delay in delays]
    counts[-1] += max(int(saved.get("frames", 0)) - sum(counts), 0)  # a WebP that stands still is a single frame
    return torch.from_numpy(np.repeat(np.stack(frames), counts, axis=0)[:most]), fps


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, in the order of their names.

    Raises:
        UserError: it holds none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise UserError(f"got the folder {folder}, which holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return files


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The settings in a file or PNG folder that `save_video` wrote; empty where there are none.

    Raises:
        UserError: no such file, or none of the four formats.
    """
    path = Path(path)
    if path.is_dir():
        path = min(path.glob("*.png"), default=path / "0000.png")
    if path.suffix == ".mp4":
        text = _mp4_comment(path)
    else:
        with _open_image(path) as image:
            text = image.info.get("comment") or image.info.get("Comment") or _exif_comment(image)
    text = text.decode("ascii", errors="replace") if isinstance(text, bytes) else text
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def to_uint8(video: Tensor | np.ndarray) -> np.ndarray:
    """A clip as uint8 (f, H, W, 3): floats in [0, 1] are clipped and rounded to the nearest of 256 levels.

    Args:
        video: (f, 3, H, W) or (f, H, W, 3), floating or uint8.

    Raises:
        UserError: another shape or dtype, no frame, or values that are not finite.
    """
    video = torch.as_tensor(video).detach().cpu()
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


# ---- formats --------------------------------------------------------------------------------------------------


def _write_webp(frames: np.ndarray, path: Path, fps: float, comment: str) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    exif = Image.Exif()
    exif.get_ifd(EXIF_SUB_FOLDER)[EXIF_USER_COMMENT] = ASCII_CODE + comment.encode("ascii")
    ends = np.round(np.arange(1, len(frames) + 1) * 1000 / fps).astype(int)
    first.save(
        path,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=np.diff(ends, prepend=0).tolist(),
        loop=0,
        quality=WEBP_QUALITY,
        exif=exif,
    )


def _write_png(frames: Iterable[np.ndarray], path: Path, fps: float, comment: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", comment)
    path.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i:04d}.png", pnginfo=text)


def _write_mp4(frames: Iterable[np.ndarray], path: Path, fps: float, comment: str) -> None:
    ffmpeg = require_ffmpeg()
    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    writer = ffmpeg.write_frames(
        str(path),
        (width + width % 2, height + height % 2),
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-metadata", f"comment={comment}", "-crf", H264_CRF, "-movflags", "+faststart", "-f", "mp4"],
    )
    try:
        with closing(writer):
            writer.send(None)
            for frame in itertools.chain([first], frames):
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                writer.send(np.ascontiguousarray(even))
    except OSError as error:
        raise UserError(f"ffmpeg could not write the MP4 ({str(error).splitlines()[0]}): use gif or webp") from None


def _read_mp4(path: Path, most: int | None = None) -> tuple[Tensor, float]:
    _require_file(path)
    try:
        with closing(require_ffmpeg().read_frames(str(path))) as reader:
            info = next(reader)
            width, height = info["size"]
            frames = [
                np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in itertools.islice(reader, most)
            ]
    except (OSError, RuntimeError) as error:
        raise UserError(f"got {path}, which ffmpeg cannot read: {str(error).splitlines()[0]}") from None
    if not frames:
        raise UserError(f"got {path}, in which ffmpeg finds no frames: check the file")
    return torch.from_numpy(np.stack(frames)), float(info["fps"])


def _mp4_comment(path: Path) -> str:
    """The comment among ffmpeg's `key=value` lines, its escapes (a backslash before = ; # \\ and newline) undone."""
    _require_file(path)
    command = [require_ffmpeg().get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"got {path}, which ffmpeg cannot read: {result.stderr.strip().splitlines()[-1]}")
    for line in result.stdout.splitlines():
        if line.startswith("comment="):
            escaped = iter(line.removeprefix("comment="))
            return "".join(next(escaped, "") if char == "\\" else char for char in escaped)
    return ""


def require_ffmpeg() -> ModuleType:
    """imageio-ffmpeg, whose ffmpeg is there to be run.

    Raises:
        UserError: it is not installed, or has no ffmpeg for this system.
    """
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError("MP4 needs ffmpeg, which is not here: pip install imageio-ffmpeg, or use gif or webp") from None
    return imageio_ffmpeg


# Written under a temporary name that hides the ending, so every writer names its format.
STREAMED = (".mp4", "")  # formats that take one frame after the other; a GIF's palette is that of all frames
WRITERS: dict[str, Callable[[Any, Path, float, str], None]] = {
    ".gif": write_gif,
    ".mp4": _write_mp4,
    ".webp": _write_webp,
    "": _write_png,
}


def _exif_comment(image: Image.Image) -> bytes:
    comment = image.getexif().get_ifd(EXIF_SUB_FOLDER).get(EXIF_USER_COMMENT, b"")
    return comment.removeprefix(ASCII_CODE) if isinstance(comment, bytes) else b""


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, EOFError) as error:
        raise _undecodable(path, error) from None


def _undecodable(path: Path, error: Exception) -> UserError:
    return UserError(f"got {path}, which cannot be decoded ({error}): it may be cut off")


def _listed(sizes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, size)) for size in sorted(sizes)[:2])


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"got {path}, which is no file: check the path")


def _open_image(path: Path) -> Image.Image:
    _require_file(path)
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise UserError(f"got {path}, expected a GIF, WebP, MP4 or PNG: it is none") from None
    except (OSError, SyntaxError) as error:
        raise _undecodable(path, error) from None
