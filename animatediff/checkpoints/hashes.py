"""The hashes that files are known by, remembered between runs: of a large model they take seconds."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

from animatediff.utils import read_cache, write_cache

LARGE = 2**24  # bytes: what is smaller is hashed at once
LARGEST_LORA = 2**31  # bytes: of larger files nobody asks for the hash of a LoRA
REMEMBERED, MOST_REMEMBERED = "hashes.json", 10_000  # files
CLOCK_TICK = 2 * 10**9  # nanoseconds: a file that was written just now may change once more and keep its time
_one_at_a_time = threading.Lock()  # whoever wants a hash that is being computed waits for it
SAMPLE_START, SAMPLE_LENGTH = 0x100000, 0x10000  # of the 8-digit hashes


@dataclass(frozen=True)
class Hashes:
    """Hex digests of one file.

    Attributes:
        sha256: of the whole file. AUTOMATIC1111 shows its first 10 digits, of textual inversions the first 12.
        weights: SHA-256 of a safetensors file behind its header, "" for others and those above 2 GiB; LoRAs are known
            by its first 12 digits.
        sample: the 8 digits that AUTOMATIC1111 showed until 2023: SHA-256 of 64 KiB, 1 MiB into the file; "" for
            smaller files.
    """

    sha256: str
    weights: str = ""
    sample: str = ""

    def match(self, digits: str) -> bool:
        """Whether this is the file that another program knows by these digits, of whichever of its hashes."""
        digits = digits.lower()
        return len(digits) >= 8 and any(h and h.startswith(digits) for h in (self.sha256, self.weights, self.sample))


def file_hashes(path: Path) -> Hashes:
    """The hashes of a file, computed anew if its place, size, time or inode have changed.

    Those of large files are kept in the user's cache folder (`REMEMBERED`).

    Raises:
        OSError: it cannot be read.
    """
    path = path.resolve()
    stat = path.stat()
    with _one_at_a_time:
        return _hashes(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _hashes(path: Path, size: int, mtime_ns: int, inode: int) -> Hashes:
    if size < LARGE:
        return _compute(path)
    state = [size, mtime_ns, inode]
    known = read_cache(REMEMBERED).get(str(path))
    if isinstance(known, list) and known[:3] == state and [type(h) for h in known[3:]] == [str] * 3:
        return Hashes(*known[3:])
    hashes = _compute(path)
    if time.time_ns() - mtime_ns > CLOCK_TICK:
        others = {name: entry for name, entry in read_cache(REMEMBERED).items() if name != str(path)}
        write_cache(REMEMBERED, others | {str(path): [*state, *astuple(hashes)]}, most=MOST_REMEMBERED)
    return hashes


def _compute(path: Path) -> Hashes:
    whole, weights = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        is_safetensors = path.suffix == ".safetensors" and os.fstat(file.fileno()).st_size < LARGEST_LORA
        header = 8 + struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        file.seek(SAMPLE_START)
        sample = file.read(SAMPLE_LENGTH)
        file.seek(0)
        at = 0
        while chunk := file.read(2**20):
            whole.update(chunk)
            if is_safetensors:
                weights.update(memoryview(chunk)[max(header - at, 0) :])
            at += len(chunk)
    digits = hashlib.sha256(sample).hexdigest()[:8] if sample else ""
    return Hashes(whole.hexdigest(), weights.hexdigest() if is_safetensors else "", digits)
