"""Which weight files were distilled to few steps: mostly their names alone tell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from animatediff.checkpoints.diffusers_json import TEXT_STEMS, UNET_STEM
from animatediff.checkpoints.files import parse_json
from animatediff.checkpoints.lora_keys import LORA_STEMS
from animatediff.checkpoints.metadata import consistency_facts
from animatediff.config.networks import (
    ANIMATE_LCM,
    ANIMATE_LCM_I2V,
    LCM,
    SDXL_TURBO,
    Distillation,
    consistency,
    hyper_sd,
    lightning,
)
from animatediff.config.settings import build
from animatediff.utils import UserError, naming

MOTION_KINDS = ("motion-module", "motion-adapter")
SDXL_KINDS = ("sdxl-checkpoint", "sdxl-unet", "sdxl-lora")
IMAGE_KINDS = (*SDXL_KINDS, "sd1-checkpoint", "sd1-unet", "diffusers-folder", "lora")
NAMELESS = (UNET_STEM, *TEXT_STEMS, *LORA_STEMS)  # of files that are called as their folders are
SNAPSHOTS = "snapshots"  # in Hugging Face's cache: models--<owner>--<name>/snapshots/<hash>/
STATED = "distillation"  # in the metadata of a file that was saved from such a pipeline: a Distillation as JSON

LIGHTNING = re.compile(r"(?i)lightning.*?(\d+)[-_ ]?step")
HYPER = re.compile(r"(?i)hyper[-_ ]?sd(?:xl|15)?[-_ ](\d+)[-_ ]?step")
TURBO = re.compile(r"(?i)sd_?xl[-_]turbo")
CONSISTENCY = re.compile(r"(?i:(?<![a-z])(animate)?lcm(?![a-z]))|LCM(?![a-z])")
SAMPLE = re.compile(r"(?i)(?<![a-z])x0(?![a-z0-9])")  # predicted, in place of the noise


def distillation_of(kind: str, version: str | None, path: Path, metadata: Mapping[str, str]) -> Distillation | None:
    """How a file or folder of this kind and version has to be sampled; None where it was not distilled.

    Raises:
        UserError: the metadata say it, but are damaged.
    """
    name = _name(path)
    if kind == "animatelcm-i2v":
        return ANIMATE_LCM_I2V
    if STATED in metadata and kind in (*MOTION_KINDS, *IMAGE_KINDS):
        with naming(path):
            return _stated(metadata[STATED])
    if kind in MOTION_KINDS:
        if version == "animatelcm" or "animatelcm" in name.lower():
            return ANIMATE_LCM
        return lightning(int(steps[1])) if (steps := LIGHTNING.search(name)) else None
    return _of_image_model(kind, name, metadata) if kind in IMAGE_KINDS else None


def distillation_metadata(distillation: Distillation | None, *, motion_module: bool) -> dict[str, str]:
    """What the file of the motion module, or of the image model, has to say of it; empty for the other one."""
    if distillation is None or distillation.name.startswith("Animate") != motion_module:  # AnimateLCM, -Diff-Lightning
        return {}
    return {STATED: json.dumps(asdict(distillation))}


def _stated(text: str) -> Distillation:
    where = f"metadata `{STATED}`"
    told = build(Distillation, parse_json(text, where), where=where)
    if told.steps not in told.possible_steps:
        raise UserError(f"got {told.steps} steps in the {where}, expected one of {told.possible_steps}: it is damaged")
    return told


def _name(path: Path) -> str:
    """What tells: the name of the file, of its folder, or of its repository in Hugging Face's cache."""
    if path.stem.removesuffix(".fp16") in NAMELESS:
        path = path.parent
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == SNAPSHOTS else path.name


def _of_image_model(kind: str, name: str, metadata: Mapping[str, str]) -> Distillation | None:
    """The same of an image model, or of a LoRA that makes one of another."""
    if "lora" in kind and (facts := consistency_facts(metadata)):
        return consistency(*facts)
    if steps := HYPER.search(name):
        needs = hyper_sd(int(steps[1]), guided="cfg" in name.lower())
        return needs if "lora" in kind else replace(needs, possible_steps=(needs.steps,))
    if kind in SDXL_KINDS and (steps := LIGHTNING.search(name)):
        needs = lightning(int(steps[1]), "SDXL")
        return replace(needs, prediction_type="sample") if SAMPLE.search(name) else needs
    if kind in SDXL_KINDS and TURBO.search(name):
        return SDXL_TURBO
    return LCM if CONSISTENCY.search(name) else None
