"""Layers that take their input a part at a time, so that less of it is in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Chunked(nn.Module):
    """A layer that may take its input a part at a time.

    Attributes:
        chunk: image tokens (pixels of latents) that are worked on at once; 0: all.
    """

    chunk = 0


def set_chunk(network: nn.Module, tokens: int) -> None:
    """Let every layer that can take at most this many image tokens at once; 0: all of them."""
    for module in network.modules():
        if isinstance(module, Chunked):
            module.chunk = tokens


_alike = False  # whether what comes after the second part is left out


@contextmanager
def parts_alike() -> Iterator[None]:
    """For tensors without contents: of all parts only two are run, as the others take the same memory."""
    global _alike
    _alike = True
    try:
        yield
    finally:
        _alike = False


def in_parts(function: Callable[..., Tensor], size: int, *inputs: Tensor, dim: int = 0) -> Tensor:
    """`function` of the inputs, `size` rows of axis `dim` at a time: only its results are there as a whole."""
    length, out = inputs[0].shape[dim], None
    for start in range(0, min(length, 2 * size) if _alike else length, size):
        count = min(size, length - start)
        part = function(*(x.narrow(dim, start, count) for x in inputs))
        if out is None:
            if count == length:
                return part
            last = part.dim() == 4 and not part.is_contiguous()
            layout = torch.channels_last if last else torch.contiguous_format
            shape = (*part.shape[:dim], length, *part.shape[dim + 1 :])
            out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        out.narrow(dim, start, count).copy_(part)
        del part
    assert out is not None
    return out
