"""What `scripts/train.py` runs: a YAML names a stage, and its other keys are that stage's."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from animatediff.config.settings import build, parse_value, read_yaml, split_assignment
from animatediff.lab.world_encoder import ShapesEncoder
from animatediff.lab.world_image import ShapesDecoder, ShapesImage
from animatediff.training.controlnet_stage import ControlNetTraining
from animatediff.training.ip_adapter_stage import IPAdapterTraining
from animatediff.training.stage_config import StageConfig
from animatediff.training.stages import (
    ConsistencyTraining,
    DomainAdapter,
    ImageFinetune,
    ImageLoRA,
    MotionLoRA,
    MotionModule,
    SparseCtrlTraining,
)
from animatediff.utils import UserError, describe

STAGES: dict[str, type[StageConfig]] = {
    stage.name: stage
    for stage in (
        ImageFinetune,
        ImageLoRA,
        DomainAdapter,
        MotionModule,
        MotionLoRA,
        SparseCtrlTraining,
        ControlNetTraining,
        IPAdapterTraining,
        ConsistencyTraining,
        ShapesImage,
        ShapesDecoder,
        ShapesEncoder,
    )
}
OLD_NAMES = {"favoured": "oversampled"}  # keys of a World


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """Read a training YAML; `overrides` are `key=value` texts, `loop.steps=10` for a key within a key.

    Raises: UserError for an unknown stage or key, a missing or mistyped value.
    """
    values = read_yaml(Path(path))
    stage = _stage(values, where=str(path))
    for item in overrides:
        key, text = split_assignment(item)
        *outer, last = names = key.split(".")
        inner = values
        for name in outer:
            inner[name] = inner = {} if inner.get(name) is None else inner[name]
            if not isinstance(inner, dict):
                raise UserError(f"override: got {item}, expected keys in {name}, which is {describe(inner)}")
        inner[last] = parse_value(text, is_text=_takes_text(_hint(stage, names)), where=f"override: {key}")
    return build_stage(values, where=str(path))


def _hint(cls: Any, names: Sequence[str]) -> Any:
    """The type of a field, or of a field within a field; None where there is none of that name."""
    for name in names:
        candidates = [c for c in (cls, *typing.get_args(cls)) if dataclasses.is_dataclass(c)]
        cls = next((typing.get_type_hints(c).get(name) for c in candidates), None)
    return cls


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint is str or (typing.get_origin(hint) is not dict and any(map(_takes_text, typing.get_args(hint))))


def build_stage(values: Any, *, where: str) -> StageConfig:
    """A stage of what a YAML holds; `where` starts every message. A key without a value has its default."""
    stage = _stage(values, where=where)
    return build(stage, expanded({key: v for key, v in values.items() if key != "stage"}, stage), where=where)


def _stage(values: Any, *, where: str) -> type[StageConfig]:
    if not isinstance(values, Mapping):
        got = f"{where}: got {describe(values)}, expected a training config, which begins with `stage:`"
        raise UserError(f"{got} (a prompt config is read by scripts/animate.py)")
    name = values.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        raise UserError(f"{where}: got stage {describe(name)}, expected one of {', '.join(STAGES)}")
    return STAGES[name]


def expanded(values: Any, hint: Any) -> Any:
    """Raw values of a dataclass, without those that are empty; a text stands for a dataclass that begins with one."""
    if typing.get_origin(hint) is dict and isinstance(values, dict):
        return {key: expanded(value, typing.get_args(hint)[1]) for key, value in values.items()}
    classes = [c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)]
    if classes and isinstance(values, str) and _hint(classes[0], [dataclasses.fields(classes[0])[0].name]) is str:
        return {dataclasses.fields(classes[0])[0].name: values}
    if not classes or not isinstance(values, dict):
        return values
    named = {OLD_NAMES.get(key, key): value for key, value in values.items() if value is not None}
    return {key: expanded(value, _hint(classes[0], [key])) for key, value in named.items()}
