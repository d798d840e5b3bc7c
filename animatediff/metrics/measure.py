"""Measures clips that are in files: paths in, a table, a CSV row per clip and a contact sheet out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from animatediff.media.comments import prompt_and_seed
from animatediff.media.pictures import write_picture
from animatediff.media.video import by_numbers, read_metadata, read_video
from animatediff.metrics.clip_metrics import ClipMetrics, Encoder, encode_frames, measure_clip
from animatediff.metrics.fvd import Extractor, frechet_distance
from animatediff.metrics.references import find_pictures, read_pictures, signed
from animatediff.metrics.tables import INK, Row, align, contact_sheet, one_line, write_csv
from animatediff.metrics.video_metrics import VideoMetrics, diversity, measure_video, shrink
from animatediff.utils import UserError, replacing

ENDINGS = (".gif", ".mp4", ".webp")
CSV = "clips.csv"
AVERAGED = tuple(name for name in VideoMetrics.__annotations__ if name != "direction")  # a mean of angles means nothing
EMBEDDED = tuple(ClipMetrics.__annotations__)
ON_SHEET = ("speed", "top_speed", "evenness", "flicker", "warp_error", "seam")
MAX_PROMPT = 2000  # characters of a prompt in a table
SHEET_CLIPS, SHEET_FRAMES, SHEET_SIZE = 40, 16, 96  # at most: rows, frames in a row, pixels of a frame's longer side


@dataclass(frozen=True)
class _Clip:
    row: dict[str, Any]  # of clips.csv
    small: Tensor  # uint8 (f, 3, h, w), shrunk
    frames: np.ndarray  # uint8 (k, h, w, 3), for the sheet
    features: Tensor | None  # (d,), for the Fréchet distance


def evaluate_videos(
    paths: Sequence[str | Path],
    *,
    output_dir: str | Path | None = None,
    encoder: Encoder | None = None,
    references: Sequence[str | Path] = (),
    extractor: Extractor | None = None,
    against: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Measure every clip of some files and folders.

    Args:
        paths: as `find_clips` takes them.
        encoder: adds the `ClipMetrics`.
        references: pictures for its domain similarity, as `find_pictures` takes them.
        extractor: adds the Fréchet video distance, by these features, to the clips `against`.
        against: as `find_clips` takes them.
        output_dir: gets `summary.json`, `clips.csv` (a row per clip: where it is from, and its `VideoMetrics`) and
            `sheet.png` (16 frames of each of the first 40 clips).

    Returns:
        `settings`; `clips`: how many; `measures`: for each number but the direction its `mean`, `lowest` and `highest`
        over the `clips` that have it; `diversity`: for each prompt with several clips of one size and length, how many
        `clips` and their `diversity`; with an extractor `fvd`: the `distance` of `clips` clips from `against` others
        by `features` numbers of each. The prompt is read from the clip; clips that name none count as clips of one
        prompt, and have no text alignment. `left_out`: clips that cannot be read, and why;
        where that leaves fewer than two, there is no distance.

    Raises:
        UserError: what `find_clips` and `find_pictures` refuse, no clip that can be read, a folder that cannot be
            made, fewer than two clips for the distance, and what encoder and extractor refuse.
    """
    files, pictures = find_clips(paths), find_pictures(references)
    others = find_clips(against) if extractor else []
    for name, found in (("videos", files), ("against", others)):
        if extractor and len(found) < 2:
            raise UserError(f"{name}: got {len(found)} clip, expected at least two for the Fréchet distance")
    folder = None if output_dir is None else _made(Path(output_dir))
    seen = torch.cat([encode_frames(encoder, read_pictures(p)) for p in pictures]) if encoder and pictures else None
    clips, left_out = [], {}
    for i, path in enumerate(tqdm(files, desc="clips", unit="clip")):
        if read := _read_or_tell(path, left_out):
            clips.append(_measure(i, path, read, encoder, seen, extractor))
    if not clips:
        raise UserError(next(iter(left_out.values())))
    apart = [
        extractor(signed(read[0])[None])
        for path in (tqdm(others, desc="against", unit="clip") if extractor else ())
        if (read := _read_or_tell(path, left_out))
    ]
    names = (*AVERAGED, *(EMBEDDED if encoder else ()))
    given = {"encoder": encoder and encoder.name, "references": references, "against": against}
    result = {
        "settings": {"videos": _texts(paths)} | {key: _texts(value) for key, value in given.items() if value},
        "clips": len(clips),
        "measures": {name: _spread([clip.row[name] for clip in clips]) for name in names},
        "diversity": _diversities(clips),
        "left_out": left_out,
    }
    if len(clips) > 1 and len(apart) > 1:
        features, other = torch.stack([clip.features for clip in clips if clip.features is not None]), torch.cat(apart)
        result["fvd"] = {
            "distance": _rounded(frechet_distance(features, other)),
            "clips": len(features),
            "against": len(other),
            "features": features.shape[1],
            "extractor": getattr(extractor, "name", type(extractor).__name__),
        }
    if folder is not None:
        with replacing(folder / "summary.json") as file:
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_csv(folder / CSV, [clip.row for clip in clips])
        write_picture(contact_sheet([_sheet_row(clip) for clip in clips[:SHEET_CLIPS]]), folder / "sheet.png")
    return result


def find_clips(paths: Sequence[str | Path]) -> list[Path]:
    """The clips that some paths stand for, each once, in the order of the paths and of the numbers in the names.

    Args:
        paths: GIF, MP4 or WebP files; folders of PNG frames; folders with any of these in them, however deep. Of the
            folder of an animate run, only its single clips, not the grid that shows all.

    Raises:
        UserError: a path that does not exist, a file of another kind, a folder without a clip.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"got {path}, which does not exist: check the path")
        if path.is_file() and path.suffix.lower() not in ENDINGS:
            raise UserError(f"got {path}, expected a file ending in {', '.join(ENDINGS)} or a folder of PNG frames")
        clips = [path] if path.is_file() else _clips_in(path)
        if not clips:
            raise UserError(f"got {path}, which has no clip in it, expected {', '.join(ENDINGS)} files or PNG frames")
        found |= dict.fromkeys(clips)
    return list(found)


def format_table(result: Mapping[str, Any]) -> str:
    """Text with a line for each measure of `evaluate_videos`, for the distance, and for each prompt's diversity."""
    lines = [("", "mean", "lowest", "highest", "clips")]
    for name, cell in result["measures"].items():
        lines.append((name, *(_short(cell[key]) for key in ("mean", "lowest", "highest")), str(cell["clips"])))
    if fvd := result.get("fvd"):
        lines.append(("fvd", _short(fvd["distance"]), "", "", f"{fvd['clips']} to {fvd['against']}"))
    for cell in result["diversity"]:
        name = f"diversity of {cell['prompt'] or '(no prompt)':.40}"
        lines.append((name, _short(cell["diversity"]), "", "", str(cell["clips"])))
    return align(lines)


def _clips_in(folder: Path) -> list[Path]:
    if (folder / "config.yaml").is_file() and (folder / "sample").is_dir():
        folder = folder / "sample"  # beside it is the grid
    children = sorted((child for child in folder.iterdir() if not child.name.startswith(".")), key=by_numbers)
    clips = []
    for child in children:
        if child.is_dir():
            clips += _clips_in(child)
        elif child.suffix.lower() in ENDINGS:
            clips.append(child)
    frames = any(child.suffix == ".png" for child in children) and not (folder / CSV).exists()  # no sheet of our own
    return clips or ([folder] if frames else [])


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --output-dir") from None
    return folder


def _measure(
    index: int,
    path: Path,
    read: tuple[Tensor, float, dict[str, Any]],
    encoder: Encoder | None,
    references: Tensor | None,
    extractor: Extractor | None,
) -> _Clip:
    video, fps, settings = read
    given, seed = prompt_and_seed(settings)
    prompt, frames = _text(given), video.movedim(1, -1).numpy()
    row = {"index": index, "path": str(path), "prompt": prompt, "seed": seed}
    row |= {"fps": fps, "height": video.shape[2], "width": video.shape[3]}
    metrics = vars(measure_video(video))
    if encoder:
        metrics = metrics | vars(measure_clip(signed(video), encoder, prompt=prompt, references=references))
    row |= {name: _rounded(value) for name, value in metrics.items()}
    shown = torch.linspace(0, len(frames) - 1, min(len(frames), SHEET_FRAMES)).round().long()
    small = ((shrink(video) + 1) * 127.5).round().to(torch.uint8)
    return _Clip(
        row,
        small,
        np.stack([_thumbnail(frame) for frame in frames[shown]]),
        extractor(signed(video)[None])[0] if extractor else None,
    )


def _read_or_tell(path: Path, left_out: dict[str, str]) -> tuple[Tensor, float, dict[str, Any]] | None:
    """As `_read`; of a clip that cannot be read None, and why in `left_out`."""
    try:
        return _read(path)
    except UserError as error:
        left_out[str(path)] = str(error)
        return None


def _read(path: Path) -> tuple[Tensor, float, dict[str, Any]]:
    """Frames uint8 (f, 3, H, W), fps and settings of a clip."""
    frames, fps = read_video(path)
    return frames.movedim(-1, 1), fps, read_metadata(path)


def _texts(paths: str | Sequence[str | Path]) -> str | list[str]:
    return paths if isinstance(paths, str) else [str(path) for path in paths]


def _text(prompt: Any) -> str | None:
    """A prompt in one cell of a table, keyframes in a row. What a file says may be anything."""
    if isinstance(prompt, Mapping):
        prompt = "; ".join(f"{k}: {v}" for k, v in prompt.items())
    return None if prompt is None else one_line(str(prompt)[:MAX_PROMPT])


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    image = Image.fromarray(frame)
    image.thumbnail((SHEET_SIZE, SHEET_SIZE))
    return np.asarray(image)


def _sheet_row(clip: _Clip) -> Row:
    names = (*ON_SHEET, *(name for name in EMBEDDED if clip.row.get(name) is not None))
    words = [Path(clip.row["path"]).name, *(f"{name} {_short(clip.row[name])}" for name in names)]
    return [(word, INK) for word in words], clip.frames


def _diversities(clips: Sequence[_Clip]) -> list[dict[str, Any]]:
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for clip in clips:
        row = clip.row
        groups[row["prompt"] or "", row["frames"], row["height"], row["width"]].append(clip.small)
    return [
        {"prompt": prompt, "clips": len(videos), "diversity": _rounded(diversity(videos))}
        for (prompt, *_), videos in groups.items()
        if len(videos) > 1
    ]


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    there = [value for value in values if value is not None]
    cells = (float(np.mean(there)), min(there), max(there)) if there else (None, None, None)
    return dict(zip(("mean", "lowest", "highest"), map(_rounded, cells), strict=True)) | {"clips": len(there)}


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
