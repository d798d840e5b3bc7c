"""How the temporal kernels are launched, by architecture, dtype and frames.

Chosen so that nothing spills and many programs fit on a multiprocessor, as the compilers of Triton 3.6 and 3.9 report
it; no row has been timed on a GPU. In Triton 3.6 an item of a batched product is one warp's work, and where there are
fewer items than warps, warps repeat each other: a program has an item for every warp, or just one and no batch.
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
    items: int  # (pixel, head) pairs per program
    warps: int
    chunk: int  # columns of a head that are in registers at once


TABLE = (
    Row("interpreter", 4, 64, 2048, 1, 32),  # a program costs milliseconds there, however large
    Row("any", 4, 16, 4, 4, 32),
    Row("sm_89", 4, 32, 1, 2, 32),
    Row("any", 4, 32, 1, 2, 16),
    Row("any", 2, 64, 1, 4, 16),
)


def tiles(q: Tensor, frames: int, num_heads: int) -> tuple[int, dict[str, int]]:
    """The number of programs for q ((b frames), s, num_heads * head_dim), and the constants of either kernel."""
    n, s, width = q.shape
    head_dim, arch = width // num_heads, launch.architecture(q)
    fits = (r for r in TABLE if r.arch in (arch, "any") and q.element_size() <= r.max_bytes and frames <= r.max_frames)
    row = next(fits)
    heads = min(row.items, power_of_2(num_heads))
    pixels = min(row.items // heads, power_of_2(s))
    low, tail = split_width(head_dim)
    chunk = min(low, row.chunk)
    constants = {
        "FRAMES": frames,
        "HEADS": num_heads,
        "WIDTH": head_dim,
        "FRAME_BLOCK": max(16, power_of_2(frames)),
        "HEAD_BLOCK": heads,
        "PIXEL_BLOCK": pixels,
        "CHUNK": chunk,
        "LAST": tail or chunk,
        "warps": row.warps,
    }
    return n // frames * blocks(s, pixels) * blocks(num_heads, heads), constants
