"""Scores of many clips of Shapes, the toy data set, as percentages, a table, CSV rows and captioned rows of frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from animatediff.media.video import to_uint8
from animatediff.metrics.tables import INK, RIGHT, WRONG, Row, align
from animatediff.world.camera import CAMERA
from animatediff.world.read import LABELS, OPPOSITES, Score
from animatediff.world.shapes import MOTIONS, SPINS, Scene

LOOKS = ("style", "watermark")
PLACED = set(MOTIONS) - set(SPINS)
MEASURES = ("smoothness", "flicker", "change", "drift", "seam")


def summarise(scores: Sequence[Score], scenes: Sequence[Scene]) -> dict[str, Any]:
    """What share of the clips is as their scenes say.

    Returns:
        `clips`: how many; `color`, `shape`, `background`, `motion`, and `all` four at once: percent right; `place`: the
        same of those that are not to spin;
        `by_motion`: for each motion that occurs, percent with this motion right, its mean amplitude over the true
        one (None for still) and how often each motion was read; `amplitudes`: the mean of each over all clips, over the
        true one; `smoothness`, `flicker`, `change`, `drift`, `seam`:
        means over the clips that have them, None without any.
    """
    right = [score.matches(scene) for score, scene in zip(scores, scenes, strict=True)]
    by_motion = {}
    for motion in {**MOTIONS, **CAMERA}:
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
        "place": _percent([s.place == c.motion for s, c in zip(scores, scenes, strict=True) if c.motion in PLACED]),
        **{name: _mean([getattr(score, name) for score in scores]) for name in MEASURES},
        "amplitudes": {name: _mean([score.amplitudes[name] for score in scores]) for name in scores[0].amplitudes},
        "by_motion": by_motion,
    }


def format_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Text with a column for each named summary: percentages, means, and the percentages of every motion."""
    names = list(summaries)
    lines = [("", *names), ("clips", *(str(summaries[name]["clips"]) for name in names))]
    lines += [(f"{label} %", *(f"{summaries[name][label]:.1f}" for name in names)) for label in (*LABELS, "all")]
    for label in ("place", *LOOKS):
        cells = [summaries[name].get(label) for name in names]
        if any(cell is not None for cell in cells):
            lines.append((f"{label} %", *("-" if cell is None else f"{cell:.1f}" for cell in cells)))
    for label in MEASURES:
        cells = [summaries[name][label] for name in names]
        lines.append((label, *("-" if cell is None else f"{cell:.3f}" for cell in cells)))
    for motion in {**MOTIONS, **CAMERA}:
        cells = [summaries[name]["by_motion"].get(motion) for name in names]
        if any(cells):
            lines.append((f"{motion} %", *("-" if cell is None else f"{cell['motion']:.1f}" for cell in cells)))
    return align(lines)


def csv_row(index: int, scene: Scene, score: Score) -> dict[str, Any]:
    """What was asked, what was read, and the numbers, flat."""
    row: dict[str, Any] = {"index": index, "caption": scene.caption}
    for label in LABELS:
        row |= {label: getattr(scene, label), f"read_{label}": getattr(score, label)}
    row |= {f"amplitude_{name}": round(value, 3) for name, value in score.amplitudes.items()}
    return row | {name: _mean([getattr(score, name)]) for name in MEASURES}


def captioned(video: Tensor, scene: Scene, score: Score) -> Row:
    """A clip (f, 3, H, W), range [-1, 1], for a contact sheet: its caption, with OK or what was read instead."""
    wrong = [f"{label} {getattr(score, label)}" for label, ok in score.matches(scene).items() if not ok]
    verdict = (f"WRONG: {', '.join(wrong)}", WRONG) if wrong else ("OK", RIGHT)
    return [(scene.caption, INK), verdict], to_uint8(video / 2 + 0.5)


def _amplitude(score: Score, motion: str) -> float:
    """Of the asked motion over the true one; negative the other way."""
    forward = {backwards: name for name, backwards in (OPPOSITES | {"zoom_in": "zoom_out"}).items()}
    return -score.amplitudes[forward[motion]] if motion in forward else score.amplitudes[motion]


def _percent(values: Sequence[bool]) -> float | None:
    return None if not values else round(100 * float(np.mean(values)), 2)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(float(np.mean(there)), 4) if there else None
