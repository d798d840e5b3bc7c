"""How the temporal kernels are launched, by architecture, dtype, frames and head width.

Chosen so that nothing spills and many programs fit on a multiprocessor, as the compiler reports it; no row has been
timed on a GPU.
"""

from typing import NamedTuple

from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks, power_of_2, split_width


class Row(NamedTuple):
    """The first row whose architecture is the tensor's or "any" and whose limits hold is taken."""

    arch: str
    max_bytes: int  # of an element
    max_frames: int
    max_width: int
    heads: int  # per program
    pixels: int  # per program
    warps: int


FORWARD = (
    Row("interpreter", 4, 64, 160, 8, 256, 1),  # a program costs milliseconds there, however large
    Row("any", 2, 16, 160, 4, 1, 4),
    Row("any", 2, 32, 160, 2, 1, 4),
    Row("any", 2, 64, 160, 1, 1, 4),
    Row("any", 4, 16, 160, 1, 1, 4),
    Row("any", 4, 64, 160, 1, 1, 8),
)
BACKWARD = (
    Row("interpreter", 4, 64, 160, 8, 256, 1),
    Row("any", 2, 16, 80, 4, 1, 4),
    Row("any", 2, 16, 160, 2, 1, 4),
    Row("any", 2, 32, 160, 2, 1, 8),
    Row("any", 2, 64, 160, 1, 1, 8),
    Row("any", 4, 16, 80, 1, 1, 4),
    Row("any", 4, 16, 160, 1, 1, 8),
    Row("any", 4, 32, 160, 1, 1, 8),
)


def tiles(table: tuple[Row, ...], q: Tensor, frames: int, num_heads: int) -> tuple[int, dict[str, int]]:
    """The number of programs for q ((b frames), s, num_heads * head_dim), and the kernel's constants."""
    n, s, width = q.shape
    head_dim, arch = width // num_heads, launch.architecture(q)
    row = next(
        row
        for row in table
        if row.arch in ("any", arch)
        and q.element_size() <= row.max_bytes
        and frames <= row.max_frames
        and head_dim <= row.max_width
    )
    heads = min(row.heads, power_of_2(num_heads))
    pixels = min(row.pixels, power_of_2(s))
    low, tail = split_width(head_dim)
    constants = {
        "FRAMES": frames,
        "HEADS": num_heads,
        "WIDTH": head_dim,
        "FRAME_BLOCK": max(16, power_of_2(frames)),
        "HEAD_BLOCK": heads,
        "PIXEL_BLOCK": pixels,
        "LOW": low,
        "TAIL": tail,
    }
    return n // frames * blocks(s, pixels) * blocks(num_heads, heads), constants | {"warps": row.warps}
