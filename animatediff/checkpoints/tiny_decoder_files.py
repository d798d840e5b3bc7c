"""Files of TAESD: the decoder as its author releases it, and diffusers' AutoencoderTiny."""

from __future__ import annotations

import re
from pathlib import Path

from animatediff.checkpoints.diffusers_json import VAE_STEM
from animatediff.checkpoints.files import find_weights, read_state_dict
from animatediff.checkpoints.load import blank, load_strictly
from animatediff.models.tiny_decoder import TinyDecoder
from animatediff.utils import UserError

NAMES = {False: ("taesd_decoder", "taesd"), True: ("taesdxl_decoder", "taesdxl")}  # nothing but its name tells SDXL's
SUFFIXES = (".safetensors", ".pth", "")  # a folder is diffusers'


def find_tiny_decoder(folder: Path, *, sdxl: bool) -> Path | None:
    """The decoder for the latents of an image model's family, by its usual name in a folder."""
    names = (folder / f"{name}{suffix}" for name in NAMES[sdxl] for suffix in SUFFIXES)
    return next((path for path in names if path.exists()), None)


def load_tiny_decoder(path: Path) -> TinyDecoder:
    """A decoder from taesd_decoder.pth or .safetensors, from AutoencoderTiny's file or its folder.

    Raises:
        UserError: something else, or a decoder of other latents.
    """
    file = find_weights(path, VAE_STEM, VAE_STEM) if path.is_dir() else path
    if file is None:
        raise UserError(f"got the folder {path}, expected diffusers' AutoencoderTiny: it has no {VAE_STEM}.safetensors")
    tensors = read_state_dict(file).tensors
    if any(key.startswith("decoder.layers.") for key in tensors):
        plain = {key.removeprefix("decoder."): t for key, t in tensors.items() if key.startswith("decoder.")}
    else:  # the author's list begins with the tanh, a layer without weights
        plain = {re.sub(r"^(\d+)", lambda m: f"layers.{int(m[1]) - 1}", key): t for key, t in tensors.items()}
    return load_strictly(blank(TinyDecoder), {key: t.float() for key, t in plain.items()}, "TAESD decoder", file)
