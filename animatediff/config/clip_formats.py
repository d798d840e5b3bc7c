"""The formats that clips are written in, and the frame rates that each can hold."""

from __future__ import annotations

from animatediff.utils import UserError

# Lowest and highest frames per second. A GIF's delays are 0.02 s (viewers slow down whatever is shorter) to 655 s.
FPS_LIMITS = {"gif": (0.002, 50.0), "mp4": (0.002, 1000.0), "webp": (0.002, 1000.0), "png": (0.002, 1000.0)}
LOOPING = ("gif", "webp")  # formats that say how often they are played


def check_fps(fps: float, format: str) -> None:
    """Tell before a clip is sampled whether its file can be played at that speed.

    Args:
        format: a key of FPS_LIMITS.

    Raises:
        UserError: it cannot.
    """
    least, most = FPS_LIMITS[format]
    if not least <= fps <= most:  # nor NaN
        advice = ": use mp4 or webp" if format == "gif" and fps > most else ""
        raise UserError(f"fps: got {fps:g} for {format}, expected {least:g} to {most:g}{advice}")
