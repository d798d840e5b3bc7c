"""Numbers that change over the frames of a clip or over the steps of sampling: one small grammar for all of them.

    0.7                       always
    [1, 1, 0.5, 0]            one number per frame
    {0: 1.0, 15: 0.5}         at these frames, evenly changing between them
    {0%: 1.0, 60%: 0.5}       at these parts of the sampling steps: 0% is the first step, 100% the last

Before the first keyframe and after the last one the nearest holds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from animatediff.utils import UserError, describe

Varying = float | tuple[float, ...] | dict[str, float]  # what the grammar is read from


@dataclass(frozen=True)
class Keyframes:
    """A number that changes.

    Attributes:
        places: rising; frame numbers, or parts of the sampling in percent.
        values: the number there, as many.
        over_steps: whether the places are parts of the sampling.
        count: how many frames a clip must have, where one number per frame was given; else 0.
    """

    places: tuple[float, ...]
    values: tuple[float, ...]
    over_steps: bool = False
    count: int = 0

    @classmethod
    def read(cls, raw: Varying | Keyframes, name: str, *, least: float = -math.inf) -> Keyframes:
        """From the grammar above.

        Args:
            name: starts every message.
            least: the smallest number that is allowed.

        Raises:
            UserError: not in the grammar, frames and parts mixed, or a number out of range.
        """
        if isinstance(raw, Keyframes):
            return raw
        points = {str(place).strip(): value for place, value in raw.items()} if isinstance(raw, Mapping) else raw
        count = len(points) if isinstance(points, Sequence) else 0
        if isinstance(points, (int, float)):
            points = {"0": points}
        elif not isinstance(points, Mapping):
            points = dict(enumerate(points))
        if not points:
            raise UserError(f"{name}: got no keyframes, expected a number, one per frame, or {{frame: number}}")
        for value in points.values():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                wanted = f"{least:g} or more" if least > -math.inf else "a number"
                raise UserError(f"{name}: got {describe(value)}, expected {wanted}")
        marked = [str(place).endswith("%") for place in points]
        if any(marked) and not all(marked):
            raise UserError(f"{name}: got both frames and parts of the sampling (with %), expected one of them")
        placed = sorted((_place(place, name, part=marked[0]), float(value)) for place, value in points.items())
        places, values = zip(*placed, strict=True)
        return cls(places, values, over_steps=marked[0], count=count)

    def check(self, name: str, frames: int) -> None:
        """Raises: UserError for a keyframe outside a clip of so many frames, or numbers for another count of them."""
        if self.count and self.count != frames:
            raise UserError(f"{name}: got {self.count} numbers for {frames} frames, expected one for each")
        if not self.over_steps and self.places[-1] >= frames:
            raise UserError(
                f"{name}: got a keyframe at frame {self.places[-1]:g}, expected 0 to {frames - 1}, the last frame of "
                "the clip"
            )

    def at(self, frame: int, part: float) -> float:
        """The number at a frame (from 0) and a part of the sampling, 0 (first step) to 1 (last)."""
        place = 100 * part if self.over_steps else frame
        after = bisect_right(self.places, place)
        if after in (0, len(self.places)):
            return self.values[max(after - 1, 0)]
        (a, b), (here, there) = self.places[after - 1 : after + 1], self.values[after - 1 : after + 1]
        return here + (there - here) * (place - a) / (b - a)


def _place(text: Any, name: str, *, part: bool) -> float:
    digits = str(text).removesuffix("%")
    try:
        place = float(digits) if part else int(digits)
    except ValueError:
        place = -1
    if place < 0 or (part and place > 100):
        wanted = "0% to 100%" if part else "a frame number from 0, or a part of the sampling such as 50%"
        raise UserError(f"{name}: got a keyframe at {text}, expected {wanted}")
    return place
