"""The golden SDXL network as files of every kind."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from animatediff.models.motion import positional_encoding
from tests.checkpoints.synthetic import tensors_of, write

FOLDER = Path(__file__).parent / "golden/sdxl"
TABLES = json.loads((FOLDER / "keys.json").read_text(encoding="utf-8"))
GOLDEN = load_file(FOLDER / "expected.safetensors")
METADATA = {"head_dim": "8", "text_num_heads": "3", "text_2_num_heads": "5"}  # 64 per head would suggest one of each
MOTION = ("sdxl-beta", "hotshot-xl")
LORA_ALPHA = 2.0


@cache
def checkpoint() -> dict[str, Tensor]:
    """A single file, with the entries that real ones hold beside the weights."""
    also = {key: torch.zeros(shape) for key, shape in TABLES["ldm_checkpoint_also_seen"].items()}
    return tensors_of("nano-xl", TABLES["ldm_checkpoint"]) | also


@cache
def refiner() -> dict[str, Tensor]:
    """A refiner of the base's sizes: the second text encoder alone, a context as wide as it, and five numbers."""
    second, label = "conditioner.embedders.1.model.", "model.diffusion_model.label_emb.0.0.weight"
    tensors = {}
    for key, tensor in checkpoint().items():
        if key.startswith("conditioner.") and not key.startswith(second):
            continue
        if ".attn2.to_k." in key or ".attn2.to_v." in key:
            tensor = tensor[:, :40]
        tensors[key.replace(second, "conditioner.embedders.0.model.")] = (
            tensor[:, : 40 + 5 * 16] if key == label else tensor
        )
    return tensors


@cache
def motion(version: str, *, positions: bool = True) -> dict[str, Tensor]:
    """A motion module as it is published: only the length of its positional encodings tells the version."""
    tensors = tensors_of(f"nano-xl-mm-{version}", TABLES["motion_module"][version])
    tables = TABLES["motion_positional_encodings"][version] if positions else {}
    cpu = torch.device("cpu")
    return tensors | {k: positional_encoding(*shape[1:], cpu, torch.float32)[None] for k, shape in tables.items()}


def write_files(folder: Path) -> Path:
    """sdxl, sdxl-beta, hotshot-xl, kohya .safetensors."""
    write(folder / "sdxl.safetensors", checkpoint(), **METADATA)
    for version in MOTION:
        write(folder / f"{version}.safetensors", motion(version))
    lora = tensors_of("nano-xl-kohya", TABLES["kohya_lora"])
    write(
        folder / "kohya.safetensors", {k: t.fill_(LORA_ALPHA) if k.endswith(".alpha") else t for k, t in lora.items()}
    )
    return folder
