"""Weights of mapped files in another type, of which only the result stays in memory."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

MAPS = Path("/proc/self/maps")
DONT_NEED = 4  # of madvise: pages of a file come back from it when they are read again


def converted(tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors on a device in a type; those that are so already stay mapped, pages of others are given back at once.

    tensors: nobody has written to them. Those without contents, on the meta device, stay there.
    """
    made, files = {}, None
    for key, tensor in tensors.items():
        made[key] = tensor.to("meta" if tensor.is_meta else device, dtype)
        if made[key] is not tensor and tensor.device.type == "cpu":
            files = files or MappedFiles()
            files.give_back(tensor)
    return made


class MappedFiles:
    """Where files lie in this process's memory, by Linux; nowhere on other systems."""

    def __init__(self) -> None:
        text = MAPS.read_text(errors="replace") if sys.platform == "linux" and MAPS.exists() else ""
        lines = re.finditer(
            r"^(\w+)-(\w+) [-r][-w][-x]p \w+ \w+:\w+ [1-9]\d* ", text, re.MULTILINE
        )  # private, of a file
        self.ranges = sorted((int(line[1], 16), int(line[2], 16)) for line in lines)

    def give_back(self, tensor: Tensor) -> bool:
        """Let go of the pages that hold nothing but this tensor, if they are a file's; whether they are."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        i = bisect.bisect_right(self.ranges, (first, sys.maxsize)) - 1
        if i < 0 or not tensor.is_contiguous() or not first < last <= self.ranges[i][1]:
            return False
        return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED) == 0
