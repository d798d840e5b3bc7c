"""The options of memory: what makes a clip fit into less of it, and how sizes of memory are written."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from animatediff.config.settings import Bool, Int, before, limits, opt, options
from animatediff.utils import UserError, describe

UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
LARGEST = 2**50
SMALLEST_TILE = 64  # pixels


def parse_size(text: str) -> int:
    """Bytes of a size such as 6GB, 6 GiB, 6000MB or 5.5gb.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]i?b?)\s*", str(text), re.IGNORECASE | re.ASCII)
    unit = match and match[2].lower().removesuffix("b") + "b"
    if not match or unit not in UNITS:
        raise UserError(f"got {describe(text)}, expected a size of memory with its unit, such as 6GB, 6 GiB or 6000MB")
    size = int(float(match[1]) * UNITS[unit])
    if not 10**6 <= size <= LARGEST:
        raise UserError(f"got {describe(text)}, expected 1 MB to 1024 TiB")
    return size


def _size(value: Any) -> Any:
    if value is None or value == "":
        return ""
    parse_size(value)
    return str(value)


def _tile(value: Any) -> Any:
    if isinstance(value, int) and 0 < value < SMALLEST_TILE:
        raise UserError(f"got {value}, expected 0, or at least {SMALLEST_TILE} pixels")
    return value


@options
class Memory:
    """What fits a clip into less memory. What is not said is chosen where `max` (on a GPU what is free) asks for it."""

    max: Annotated[str, before(_size)] = opt(
        "", "memory that may be used, such as 6GB; by default what is free on a GPU, all of it elsewhere", "max_memory"
    )
    batch_size: Int = opt(
        1, "clips of an entry that are sampled together, at most; fewer where memory is short. Equal but for rounding",
        ge=1,
    )  # fmt: skip
    vae_frames: Int = opt(8, "frames that the VAE takes at once; exact", ge=1)
    vae_tile: Annotated[Int, before(_tile), limits(ge=0, multiple_of=8)] = opt(
        0,
        "side in pixels of tiles that the VAE takes one by one; 0: none. Not exact: colours may shift a little by tile",
    )
    chunk_tokens: Int = opt(
        0, "latent pixels that the network's layers take at once; 0: all. Equal but for rounding, slower if small", ge=0
    )
    split_guidance: Bool = opt(False, "the parts of guidance go through the network one by one; equal but for rounding")
    offload: Literal["none", "idle", "blocks"] = opt(
        "none", "off the GPU: idle: what has nothing to do; blocks: the UNet, too, block by block. Exact, slower"
    )
    weights: Literal["", "float16", "bfloat16", "float8"] = opt(
        "",
        "how the UNet's weights rest, computing in dtype. Exact where files hold it, else rounded (float8: by 2.6 %)",
        "weights_dtype",
    )

    @property
    def bytes(self) -> int | None:
        """What `max` says."""
        return parse_size(self.max) if self.max else None
