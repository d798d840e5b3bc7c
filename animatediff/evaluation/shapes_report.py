"""Scores of many clips as percentages, a table, CSV rows, and a sheet of frames to look at."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from animatediff.data.shapes import MOTIONS, Scene
from animatediff.data.video_io import to_uint8
from animatediff.evaluation.shapes import LABELS, OPPOSITES, Score

MEASURES = ("smoothness", "flicker", "change", "drift")
CAPTION_HEIGHT, MARGIN = 16, 4  # pixels of a contact sheet
RIGHT, WRONG, INK, PAPER = (20, 120, 40), (190, 20, 20), (20, 20, 20), (255, 255, 255)


def summarise(scores: Sequence[Score], scenes: Sequence[Scene]) -> dict[str, Any]:
    """What share of the clips is as their scenes say.

    Returns:
        `clips`: how many; `color`, `shape`, `background`, `motion`, and `all` four at once: percent right;
        `by_motion`: for each motion that occurs, percent with this motion right, its mean amplitude over the true
        one (None for still) and how often each motion was read; `smoothness`, `flicker`, `change`, `drift`: means.
    """
    right = [score.matches(scene) for score, scene in zip(scores, scenes, strict=True)]
    by_motion = {}
    for motion in MOTIONS:
        members = [score for score, scene in zip(scores, scenes, strict=True) if scene.motion == motion]
        if members:
            read = Counter(score.motion for score in members)
            by_motion[motion] = {
                "clips": len(members),
                "motion": _percent([score.motion == motion for score in members]),
                "amplitude": None if motion == "still" else _mean([_amplitude(score, motion) for score in members]),
                "read_as": dict(read.most_common()),
            }
    return {
        "clips": len(right),
        **{label: _percent([r[label] for r in right]) for label in LABELS},
        "all": _percent([all(r.values()) for r in right]),
        **{name: _mean([getattr(score, name) for score in scores]) for name in MEASURES},
        "by_motion": by_motion,
    }


def format_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Text with a column for each named summary: percentages, means, and the percentages of every motion."""
    names = list(summaries)
    lines = [("", *names), ("clips", *(str(summaries[name]["clips"]) for name in names))]
    lines += [(f"{label} %", *(f"{summaries[name][label]:.1f}" for name in names)) for label in (*LABELS, "all")]
    lines += [(label, *(f"{summaries[name][label]:.3f}" for name in names)) for label in MEASURES]
    for motion in MOTIONS:
        cells = [summaries[name]["by_motion"].get(motion) for name in names]
        if any(cells):
            lines.append((f"{motion} %", *("-" if cell is None else f"{cell['motion']:.1f}" for cell in cells)))
    width = max(len(line[0]) for line in lines)
    return "\n".join(line[0].ljust(width) + "".join(cell.rjust(12) for cell in line[1:]) for line in lines)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the keys of the first as the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def csv_row(index: int, scene: Scene, score: Score) -> dict[str, Any]:
    """What was asked, what was read, and the numbers, flat."""
    row: dict[str, Any] = {"index": index, "caption": scene.caption}
    for label in LABELS:
        row |= {label: getattr(scene, label), f"read_{label}": getattr(score, label)}
    row |= {f"amplitude_{name}": round(value, 3) for name, value in score.amplitudes.items()}
    return row | {name: round(getattr(score, name), 4) for name in MEASURES}


def contact_sheet(videos: Sequence[Tensor], scenes: Sequence[Scene], scores: Sequence[Score]) -> Image.Image:
    """A row of frames for each clip under its caption, with OK or what was read instead.

    Args:
        videos: clips (f, 3, H, W), range [-1, 1], equal in size.
    """
    strips = [np.concatenate(list(to_uint8(video / 2 + 0.5)), axis=1) for video in videos]
    height, width, _ = strips[0].shape
    row = CAPTION_HEIGHT + height + MARGIN
    sheet = Image.new("RGB", (width + 2 * MARGIN, row * len(strips) + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (strip, scene, score) in enumerate(zip(strips, scenes, scores, strict=True)):
        top = MARGIN + i * row
        wrong = [f"{label} {getattr(score, label)}" for label, ok in score.matches(scene).items() if not ok]
        verdict = f"WRONG: {', '.join(wrong)}" if wrong else "OK"
        draw.text((MARGIN, top), scene.caption, fill=INK, font=font)
        after = MARGIN + draw.textlength(f"{scene.caption}   ", font=font)
        draw.text((after, top), verdict, fill=WRONG if wrong else RIGHT, font=font)
        sheet.paste(Image.fromarray(strip), (MARGIN, top + CAPTION_HEIGHT))
    return sheet


def _amplitude(score: Score, motion: str) -> float:
    """Of the asked motion over the true one; negative the other way."""
    forward = {backwards: name for name, backwards in OPPOSITES.items()}
    return -score.amplitudes[forward[motion]] if motion in forward else score.amplitudes[motion]


def _percent(values: Sequence[bool]) -> float:
    return round(100 * float(np.mean(values)), 2)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)
