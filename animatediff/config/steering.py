"""What steers an animation beside prompts, as a user says it. No torch here: configs are read without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from animatediff.config.keyframes import Keyframes, Varying
from animatediff.utils import UserError

NoiseType = Literal["random", "shuffle", "repeat", "constant"]
Loop = Literal["", "rotate", "pingpong"]

# key of the config that names LoRAs -> key of Steering that schedules them
LORA_SCHEDULES = {"lora_model_path": "lora_schedule", "motion_module_lora_configs": "motion_lora_schedule"}


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


@dataclass(frozen=True)
class FreeU:
    """Stronger backbone, weaker skip connections in the two coarsest blocks on the way up (arXiv 2309.11497).

    The defaults are the paper's for SD 1.4; 1 everywhere changes nothing.
    """

    b1: float = 1.5
    b2: float = 1.6
    s1: float = 0.9
    s2: float = 0.2

    @property
    def b(self) -> tuple[float, float]:
        return self.b1, self.b2

    @property
    def s(self) -> tuple[float, float]:
        return self.s1, self.s2


@dataclass(frozen=True, kw_only=True)
class Steering:
    """All of it. Whatever is left at its default changes nothing and costs nothing.

    What varies is given in the grammar of `keyframes.py`: a number, one per frame, {frame: number}, {part%: number}.
    A schedule is a factor: it multiplies the scale it is named after.
    """

    motion_scale: Varying | None = None  # of what the motion modules do; 0: each frame by the image model alone
    motion_mask: str = ""  # a picture: where it is black, the motion modules do nothing
    pe_stretch: float = 1.0  # 2: positions half as far apart, for clips twice as long, or half as fast
    guidance_schedule: Varying | None = None
    guidance_rescale: float = 0.0  # share of arXiv 2305.08891, sec. 3.4; 0.7 there
    pag_scale: float = 0.0  # perturbed-attention guidance (arXiv 2403.17377); 3 there
    pag_layers: tuple[str, ...] = ("mid_block",)  # beginnings of the names of the blocks whose attention is perturbed
    freeu: FreeU | None = None
    lora_schedule: Varying | None = None  # over steps, of lora_alpha
    motion_lora_schedule: Varying | None = None  # over steps, of all MotionLoRAs
    noise_type: NoiseType = "random"  # shuffle: FreeNoise (arXiv 2310.15169); repeat, constant: the same frames again
    freeinit: FreeInit | None = None
    loop: Loop = ""  # rotate: the clip's beginning is another one at every step; pingpong: there and back

    def check(self, frames: int, *, windows: bool, motion: bool, loras: Collection[str]) -> None:
        """Raise UserError for a value out of range, or one that would do nothing here.

        Args:
            frames: of the clip.
            windows: whether it is made in windows.
            motion: whether there is a motion module.
            loras: the keys that name LoRAs.
        """
        for key, choices in (("noise_type", NoiseType), ("loop", Loop)):
            if (value := getattr(self, key)) not in (known := get_args(choices)):
                raise UserError(f"{key}: got {value!r}, expected one of {', '.join(filter(None, known))}")
        if not 0 < self.pe_stretch < math.inf:
            raise UserError(f"pe_stretch: got {self.pe_stretch:g}, expected above 0 (1 changes nothing)")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale: got {self.guidance_rescale:g}, expected 0 (off) to 1")
        if not 0 <= self.pag_scale < math.inf:
            raise UserError(f"pag_scale: got {self.pag_scale:g}, expected 0 (off) or more")
        if self.loop == "rotate" and windows:
            raise UserError("loop: got rotate with windows, expected one of them: window_schedule=closed is a loop")
        if not motion and (given := {"motion_scale", "motion_mask", "pe_stretch"} & set(self.said())):
            raise UserError(f"{min(given)}: got it without a motion_module, expected one: remove it")
        if self.pag_layers != Steering.pag_layers and not self.pag_scale:
            raise UserError("pag_layers: got it without a pag_scale, expected one above 0, such as 3")
        for key in ("motion_scale", "guidance_schedule", *LORA_SCHEDULES.values()):
            if (raw := getattr(self, key)) is None:
                continue
            keyframes = Keyframes.read(raw, key, least=0 if key == "guidance_schedule" else -math.inf)
            keyframes.check(key, frames)
            if "lora" in key and not keyframes.over_steps:
                raise UserError(f"{key}: got no parts of the sampling, expected them, such as {{0%: 0, 50%: 1}}")
        for named, key in LORA_SCHEDULES.items():
            if getattr(self, key) is not None and named not in loras:
                raise UserError(f"{key}: got it without {named}, expected LoRAs to schedule: remove it")

    def said(self) -> dict[str, Any]:
        """What is not at its default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(Steering)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def changed(self, **values: Any) -> Steering:
        """With those of the values that are not None."""
        return Steering(**self.said() | {name: value for name, value in values.items() if value is not None})
