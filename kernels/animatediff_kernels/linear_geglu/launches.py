"""How the product with the gate is launched, by architecture, dtype and width.

Chosen so that nothing spills and, with 16-bit numbers, two programs share a multiprocessor: one multiplies while the
other computes error functions. Hopper multiplies faster than its L2 cache delivers small tiles, so there long sums get
a tile twice as wide, which has the multiprocessor for itself. No row has been timed on a GPU.
"""

from typing import NamedTuple

from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import power_of_2


class Row(NamedTuple):
    """The first row whose architecture is the tensor's or "any" and whose limits hold is taken."""

    arch: str
    max_bytes: int  # of an element
    max_width: int
    rows: int  # per tile
    columns: int  # of the output, per tile: the product is twice as wide
    depth: int  # terms of the sums per step
    warps: int
    stages: int


WIDEST = 8192
TABLE = (
    Row("interpreter", 4, WIDEST, 256, 256, 256, 1, 1),  # a program costs milliseconds there, however large
    Row("sm_90", 2, 320, 128, 64, 64, 8, 3),
    Row("sm_90", 2, WIDEST, 128, 128, 64, 8, 3),
    Row("any", 2, WIDEST, 128, 64, 32, 4, 4),
    Row("any", 4, WIDEST, 64, 32, 32, 4, 2),
)
NEIGHBOURS = 8  # tiles of rows that use a tile of weights one after the other, while it is in the L2 cache


def tiles(x: Tensor, rows: int, inner: int) -> dict[str, int]:
    """The constants of the kernel for x (rows, width)."""
    arch, width = launch.architecture(x), x.shape[1]
    fits = (r for r in TABLE if r.arch in (arch, "any") and x.element_size() <= r.max_bytes and width <= r.max_width)
    row = next(fits)
    return {
        "WIDTH": width,
        "INNER": inner,
        "ROW_BLOCK": min(row.rows, max(16, power_of_2(rows))),
        "COLUMN_BLOCK": min(row.columns, max(16, power_of_2(inner))),
        "DEPTH": min(row.depth, max(16, power_of_2(width))),
        "NEIGHBOURS": NEIGHBOURS,
        "warps": row.warps,
        "stages": row.stages,
    }
