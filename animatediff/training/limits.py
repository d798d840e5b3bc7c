"""What the numbers of a training's config may be."""

from __future__ import annotations

import math
from typing import Any

from animatediff.config.values import MAX_SEED
from animatediff.utils import UserError

LIMITS = {  # of the keys that a stage has: the smallest and the largest
    "threads": (1, math.inf),
    "rank": (1, math.inf),
    "seed": (0, MAX_SEED),
    "noisy_share": (0, 1),
    "guidance_scale": (0, math.inf),
}


def check_numbers(config: Any) -> None:
    """Raises: UserError where a number of a stage's dataclass is out of its range."""
    for key, value in vars(config).items():
        low, high = LIMITS.get(key, (None, None))
        if low is not None and not low <= value <= high:
            expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise UserError(f"{key}: got {value}, expected {expected}")
