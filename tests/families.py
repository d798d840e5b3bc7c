"""PIA, AnimateLCM-I2V and CameraCtrl files for the golden network, and the golden numbers of what they compute."""

import json
from functools import cache
from pathlib import Path

from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints.synthetic import TABLES as NANO_TABLES
from tests.checkpoints.synthetic import tensors_of

FOLDER = Path(__file__).parent / "golden/families"
TABLES = json.loads((FOLDER / "video_keys.json").read_text(encoding="utf-8"))


@cache
def expected(family: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{family}.safetensors")


def video(family: str, name: str) -> Tensor:
    """A video of the expected numbers, (b, c, f, h, w) in the file, as (b, f, c, h, w)."""
    return rearrange(expected(family)[name], "b c f h w -> b f c h w")


@cache
def conditioned_motion_tensors(family: str) -> dict[str, Tensor]:
    """The whole file of PIA or AnimateLCM-I2V."""
    table = TABLES[family]
    return tensors_of(table["salt"], NANO_TABLES["motion_module"][table["motion_module"]] | table["keys"])


@cache
def cameractrl_tensors() -> dict[str, Tensor]:
    """The flat file of both state dicts."""
    table = TABLES["cameractrl"]
    return tensors_of(table["salt"], table["pose_encoder"] | table["attention_processor"])
