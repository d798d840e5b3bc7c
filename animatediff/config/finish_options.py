"""Options of what happens to a clip after it is sampled."""

from __future__ import annotations

from typing import Annotated, Literal

from animatediff.config.settings import Bool, Float, Int, limits, opt, options
from animatediff.config.values import INTERPOLATOR, SOUND, UPSCALER, PathText

MAX_SIDE = 16384  # pixels that no machine can sample: a slip of the finger


@options
class Finish:
    """After a clip is sampled: larger, then smoother, then written, with its sound (docs/finishing.md)."""

    scale: Annotated[Float, limits(ge=1, le=8)] | None = opt(
        None, "how many times higher and wider the clip becomes (1; with an upscaler its own factor)"
    )
    upscaler: Annotated[PathText, UPSCALER] = opt("", "upscaler model, such as ESRGAN's (spandrel); none: Lanczos")
    strength: Float = opt(0.0, "of a second pass over the larger clip (hires fix): 0.2 to 0.6; 0: none", ge=0, le=1)
    enlarge: Literal["pixels", "latents"] = opt(
        "pixels", "what the second pass starts from: enlarged pixels, or enlarged latents, which take more strength"
    )
    steps: Annotated[Int, limits(ge=1)] | None = opt(
        None, "of the second pass, of which it takes its strength (the clip's)"
    )
    tile: Annotated[Int, limits(multiple_of=8)] = opt(
        0, "pixels of a side of the second pass's tiles, such as 512; 0: pictures in one piece", ge=0, le=MAX_SIDE
    )
    match_colors: Bool = opt(True, "give the larger clip the colours, in mean and spread, of the first one")
    interpolate: Literal[1, 2, 4, 8] = opt(1, "how many times as many frames per second, made by the clip's own motion")
    interpolator: Annotated[PathText, INTERPOLATOR] = opt(
        "", "learned model in its place: RIFE 4.5 to 4.26, or FILM's program"
    )
    loop: Bool | None = opt(None, "make frames between the last and the first, too; by default where the clip loops")
    audio: Annotated[PathText, SOUND] = opt("", "file whose sound goes along, copied as it is (for mp4)")

    @property
    def enlarges(self) -> bool:
        return bool(self.upscaler) or (self.scale or 1) != 1 or self.strength > 0

    @property
    def changes(self) -> bool:
        """Whether frames are to become others."""
        return self.enlarges or self.interpolate > 1
