"""Files of every kind for a tiny network, from the golden key tables; weights are a formula of their key."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from animatediff.checkpoints.files import write_state_dict
from tests.golden.synthetic_weights import synthetic_tensor

TABLES = json.loads((Path(__file__).parents[1] / "golden/nano/keys.json").read_text(encoding="utf-8"))
METADATA = {"text_num_heads": "4"}  # a width of 40 would suggest one head
WIDTHS = (32, 64, 64, 96)


def tensors_of(salt: str, table: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.as_tensor(synthetic_tensor(salt, key, shape)) for key, shape in table.items()}


@cache
def ldm_tensors() -> dict[str, Tensor]:
    return tensors_of("nano", TABLES["ldm_checkpoint"])


@cache
def motion_tensors(version: str) -> dict[str, Tensor]:
    return tensors_of(f"nano-mm-{version}", TABLES["motion_module"][version])


@cache
def lora_tensors(table: str) -> dict[str, Tensor]:
    return tensors_of(table, TABLES[table])


@cache
def sparsectrl_tensors(kind: str) -> dict[str, Tensor]:
    return tensors_of(f"nano-sparsectrl-{kind}", TABLES["sparsectrl"][kind])


def with_positional(tensors: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """As the released motion modules: every attention carries an encoding of (1, frames, channels)."""
    tables = {
        key.replace("to_q.weight", "pos_encoder.pe"): torch.randn(1, frames, t.shape[0])
        for key, t in tensors.items()
        if key.endswith("to_q.weight")
    }
    one_per_width = {table.shape: table for table in tables.values()}
    return tensors | {key: one_per_width[table.shape] for key, table in tables.items()}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    return write_state_dict(path, tensors, metadata=metadata)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same keys, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
