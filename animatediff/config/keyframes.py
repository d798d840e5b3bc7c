"""Numbers that change over the frames of a clip or over the steps of sampling: one small grammar for all of them.

    0.7                       always
    [1, 1, 0.5, 0]            one number per frame
    {0: 1.0, 15: 0.5}         at these frames, evenly changing between them
    {0%: 1.0, 60%: 0.5}       at these percentages of the sampling steps: 0% is the first step, 100% the last

Before the first keyframe and after the last one the nearest holds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from animatediff.utils import UserError, describe

Varying = float | tuple[float, ...] | dict[str, float]  # what the grammar is read from


@dataclass(frozen=True)
class Keyframes:
    """A number that changes.

    Attributes:
        positions: rising; frame numbers, or percentages of the sampling steps.
        values: the number there, as many.
        over_steps: whether the positions are percentages.
        count: how many frames a clip must have, where one number per frame was given; else 0.
    """

    positions: tuple[float, ...]
    values: tuple[float, ...]
    over_steps: bool = False
    count: int = 0

    @classmethod
    def read(cls, raw: Varying | Keyframes, *, least: float = -math.inf) -> Keyframes:
        """From the grammar above.

        Args:
            least: the smallest number that is allowed.

        Raises:
            UserError: not in the grammar, frames and percentages mixed, or a number out of range.
        """
        if isinstance(raw, Keyframes):
            return raw
        raw = raw.tolist() if hasattr(raw, "tolist") else raw  # numpy, torch
        if isinstance(raw, (int, float)):
            points: Mapping[Any, Any] = {0: raw}
        elif isinstance(raw, Mapping):
            points = raw
        elif isinstance(raw, (list, tuple)):
            points = dict(enumerate(raw))
        else:
            raise UserError(f"got {describe(raw)}, expected a number, one per frame, or {{frame: number}}")
        if not points:
            raise UserError("got no keyframes, expected a number, one per frame, or {frame: number}")
        for value in points.values():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                wanted = f"{least:g} or more" if least > -math.inf else "a number"
                raise UserError(f"got {describe(value)}, expected {wanted}")
        over_steps = [str(position).strip().endswith("%") for position in points]
        if any(over_steps) and not all(over_steps):
            raise UserError("got both frames and percentages of the steps, expected one of them")
        placed = sorted((_position(p, percent=over_steps[0]), float(v)) for p, v in points.items())
        positions, values = zip(*placed, strict=True)
        count = len(points) if isinstance(raw, (list, tuple)) else 0
        return cls(positions, values, over_steps=over_steps[0], count=count)

    def check(self, frames: int) -> None:
        """Raises: UserError for a keyframe outside a clip of so many frames, or numbers for another count of them."""
        if self.count and self.count != frames:
            raise UserError(f"got {self.count} numbers for {frames} frames, expected one for each")
        if not self.over_steps and self.positions[-1] >= frames:
            raise UserError(
                f"got a keyframe at frame {self.positions[-1]:g}, expected 0 to {frames - 1}, as the clip has {frames} "
                "frames"
            )

    def at(self, frame: int, progress: float) -> float:
        """The number at a frame (from 0), at a step whose progress is 0 (the first) to 1 (the last)."""
        position = 100 * progress if self.over_steps else frame
        after = bisect_right(self.positions, position)
        if after in (0, len(self.positions)):
            return self.values[max(after - 1, 0)]
        (a, b), (left, right) = self.positions[after - 1 : after + 1], self.values[after - 1 : after + 1]
        return left + (right - left) * (position - a) / (b - a)


def _position(text: Any, *, percent: bool) -> float:
    digits = str(text).strip().removesuffix("%")
    try:
        position = float(digits) if percent else int(digits)
    except ValueError:
        position = -1
    if not 0 <= position <= (100 if percent else 2**31):
        wanted = "0% to 100%" if percent else "a frame number from 0, or a percentage of the steps such as 50%"
        raise UserError(f"got a keyframe at {text}, expected {wanted}")
    return position
