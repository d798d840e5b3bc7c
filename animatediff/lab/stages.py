"""What `scripts/train.py` runs: a YAML names a stage, and its other keys are that stage's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from animatediff.config.dataclass_io import build_dataclass, parse_overrides, read_yaml
from animatediff.lab.world_encoder import ShapesEncoder
from animatediff.lab.world_image import ShapesDecoder, ShapesImage
from animatediff.training.stages import (
    DomainAdapter,
    ImageFinetune,
    ImageLoRA,
    MotionLoRA,
    MotionModule,
    SparseCtrlTraining,
    Training,
)
from animatediff.utils import UserError

StageConfig = ShapesImage | ShapesDecoder | ShapesEncoder | Training
STAGES: dict[str, type[StageConfig]] = {
    stage.name: stage
    for stage in (
        ImageFinetune,
        ImageLoRA,
        DomainAdapter,
        MotionModule,
        MotionLoRA,
        SparseCtrlTraining,
        ShapesImage,
        ShapesDecoder,
        ShapesEncoder,
    )
}


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """Read a training YAML; `overrides` are `key=value` texts for its top-level keys.

    Raises: UserError for an unknown stage or key, a missing or mistyped value.
    """
    raw: Any = read_yaml(Path(path))
    return build_stage(raw, overrides, where=str(path))


def build_stage(raw: Any, overrides: Sequence[str] = (), *, where: str) -> StageConfig:
    """`load_train_config` of what a YAML holds; `where` starts every message."""
    got = raw.get("stage") if isinstance(raw, Mapping) else raw
    if not isinstance(got, str) or got not in STAGES:
        raise UserError(f"{where}: got stage {got!r:.100}, expected one of {', '.join(STAGES)}")
    cls = STAGES[got]
    values = {key: value for key, value in raw.items() if key != "stage"} | parse_overrides(cls, overrides)
    return build_dataclass(cls, values, where=where)
