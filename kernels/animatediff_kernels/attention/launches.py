"""How the attention kernels are launched, by architecture, dtype and head width.

Chosen so that nothing spills and several programs share a multiprocessor, which is what hides the softmax behind the
matrix products; no row has been timed on a GPU.
"""

from typing import NamedTuple

from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import power_of_2, split_width


class Row(NamedTuple):
    """The first row whose architecture is the tensor's or "any" and whose limits hold is taken."""

    arch: str
    max_bytes: int  # of an element
    max_width: int
    queries: int  # per tile
    keys: int  # per tile
    warps: int
    stages: int


FORWARD = (
    Row("interpreter", 4, 160, 256, 256, 1, 1),  # a program costs milliseconds there, however large
    Row("any", 2, 64, 64, 64, 4, 2),
    Row("any", 2, 96, 64, 64, 4, 2),
    Row("sm_89", 2, 160, 64, 32, 4, 1),
    Row("any", 2, 160, 64, 32, 4, 2),
    Row("any", 4, 64, 64, 32, 4, 1),
    Row("any", 4, 160, 16, 32, 8, 1),
)
SINGLE_PASS = (  # keys here is the largest number that the row takes; all of them stay in registers or shared memory
    Row("interpreter", 4, 160, 256, 256, 1, 1),
    Row("any", 2, 64, 64, 128, 4, 1),
    Row("any", 2, 64, 32, 256, 4, 1),
    Row("any", 2, 96, 32, 128, 4, 1),
    Row("any", 2, 160, 32, 128, 4, 1),
)
QUERY_GRADIENT = (
    Row("interpreter", 4, 160, 256, 256, 1, 1),
    Row("any", 2, 64, 64, 64, 4, 1),
    Row("any", 2, 96, 64, 32, 4, 1),
    Row("sm_90", 2, 160, 64, 32, 8, 1),
    Row("any", 2, 160, 32, 16, 4, 1),
    Row("any", 4, 64, 64, 32, 8, 1),
    Row("any", 4, 160, 16, 32, 8, 1),
)
KEY_GRADIENT = (
    Row("interpreter", 4, 160, 256, 256, 1, 1),
    Row("sm_90", 2, 64, 64, 64, 4, 1),
    Row("any", 2, 64, 32, 64, 4, 1),
    Row("sm_90", 2, 96, 32, 64, 4, 1),
    Row("any", 2, 96, 16, 64, 4, 1),
    Row("sm_90", 2, 160, 32, 64, 8, 1),
    Row("sm_89", 2, 160, 32, 16, 4, 2),
    Row("any", 2, 160, 16, 64, 8, 2),
    Row("any", 4, 64, 16, 64, 8, 1),
    Row("any", 4, 160, 16, 16, 8, 1),
)


def pick(table: tuple[Row, ...], q: Tensor, head_dim: int, keys: int = 0) -> Row | None:
    """The row for queries q of this head width; with `keys`, one whose tile takes them all. None if there is none."""
    arch = launch.architecture(q)
    for row in table:
        fits = q.element_size() <= row.max_bytes and head_dim <= row.max_width and keys <= row.keys
        if fits and row.arch in ("any", arch):
            return row
    return None


def tiles(row: Row | None, tokens: int, keys: int, head_dim: int, num_heads: int) -> dict[str, int]:
    """The constants that all attention kernels share."""
    assert row is not None, "the dispatch let through what no row takes"
    low, tail = split_width(head_dim)
    return {
        "HEADS": num_heads,
        "WIDTH": head_dim,
        "KEYS": keys,
        "QUERY_BLOCK": min(row.queries, max(16, power_of_2(tokens))),
        "KEY_BLOCK": min(row.keys, max(16, power_of_2(keys))),
        "LOW": low,
        "TAIL": tail,
        "warps": row.warps,
        "stages": row.stages,
    }
