"""ControlNet and IP-Adapter files for the golden network, and the golden numbers of what they compute."""

import json
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints.synthetic import tensors_of, write

FOLDER = Path(__file__).parent / "golden/control"
TABLES = json.loads((FOLDER / "keys.json").read_text(encoding="utf-8"))
CONFIG = TABLES["config"]
EXPECTED = load_file(FOLDER / "expected.safetensors")
FRAMES = CONFIG["frames"]


def video(name: str) -> Tensor:
    """A video of the expected numbers, (b, c, f, h, w) in the file, as (b, f, c, h, w)."""
    return rearrange(EXPECTED[name], "b c f h w -> b f c h w")


@cache
def controlnet_tensors(salt: str = "nano-control") -> dict[str, Tensor]:
    """In the original spelling, with its prefix."""
    return tensors_of(salt, TABLES["control"])


def controlnet_diffusers_tensors() -> dict[str, Tensor]:
    return {ours: controlnet_tensors()[key] for ours, (key, _) in TABLES["control_diffusers"].items()}


def hint(name: str = "input.hint") -> Tensor:
    """(f, 3, H, W) in [0, 1]."""
    return video(name)[0].float() / 255


def per_part(*scales: float, frames: int = FRAMES) -> Tensor:
    """One factor for each entry of the batch, for residuals ((b f), c, h, w)."""
    return torch.tensor(scales).repeat_interleave(frames)[:, None, None, None]


@cache
def ip_adapter_tensors(variant: str) -> dict[str, Tensor]:
    return tensors_of(TABLES["salts"][f"ip_{variant}"], TABLES["ip_adapter"][variant])


@cache
def clip_vision_tensors() -> dict[str, Tensor]:
    return tensors_of("nano-clip", TABLES["clip_vision"])


def write_image_encoder(folder: Path) -> Path:
    """A transformers folder."""
    folder.mkdir(exist_ok=True)
    write(folder / "model.safetensors", clip_vision_tensors())
    (folder / "config.json").write_text(json.dumps(CONFIG["clip"]), encoding="utf-8")
    return folder
