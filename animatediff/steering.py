"""What steers an animation beside prompts, as a user says it. No torch here: configs are read without it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from animatediff.utils import UserError


@dataclass(frozen=True)
class FreeInit:
    """Sample several times, each from a start that the one before has improved (arXiv 2312.07537)."""

    iterations: int = 3
    filter: Literal["butterworth", "gaussian", "ideal", "box"] = "butterworth"
    order: int = 4  # of butterworth: the higher, the sharper
    spatial_stop: float = 0.25  # parts of the highest frequency that are kept; 0: all is fresh noise
    temporal_stop: float = 0.25
    fast: bool = False  # the first iterations take fewer steps, the last one all

    def __post_init__(self) -> None:
        for key in ("iterations", "order"):
            if (value := getattr(self, key)) < 1:
                raise UserError(f"freeinit {key}: got {value}, expected at least 1")
        for key in ("spatial_stop", "temporal_stop"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise UserError(f"freeinit {key}: got {value:g}, expected 0 to 1, a part of the highest frequency")

    def steps(self, iteration: int, steps: int) -> int:
        """Sampling steps of an iteration (from 0)."""
        return max(steps * (iteration + 1) // self.iterations, 1) if self.fast else steps


@dataclass(frozen=True, kw_only=True)
class Steering:
    """All of it. Whatever is left at its default changes nothing and costs nothing."""

    freeinit: FreeInit | None = None

    def check(self, frames: int) -> None:
        """Raises: UserError for a value out of range, or one that does not fit a clip of so many frames."""

    def said(self) -> dict[str, Any]:
        """What is not at its default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(Steering)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def changed(self, **values: Any) -> Steering:
        """With those of the values that are not None."""
        return Steering(**self.said() | {name: value for name, value in values.items() if value is not None})
