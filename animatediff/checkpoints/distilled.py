"""Which weight files were distilled to few steps: mostly their names alone tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from animatediff.checkpoints.diffusers_json import TEXT_STEMS, UNET_STEM
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

MOTION_KINDS = ("motion-module", "motion-adapter")
SDXL_KINDS = ("sdxl-checkpoint", "sdxl-lora")
IMAGE_KINDS = (*SDXL_KINDS, "sd1-checkpoint", "sd1-unet", "diffusers-folder", "lora")
NAMELESS = (UNET_STEM, *TEXT_STEMS, *LORA_STEMS)  # of files that are called as their folders are

LIGHTNING = re.compile(r"lightning.*?(\d+)[-_ ]?step")
HYPER = re.compile(r"hyper[-_ ]?sd(?:xl|15)?[-_ ](\d+)[-_ ]?step")
TURBO = re.compile(r"sd_?xl[-_]turbo")
CONSISTENCY = re.compile(r"(?<![a-z])(animate)?lcm(?![a-z])")
SAMPLE = re.compile(r"(?<![a-z])x0(?![a-z0-9])")  # predicted, in place of the noise


def distillation_of(kind: str, version: str | None, path: Path, metadata: Mapping[str, str]) -> Distillation | None:
    """How a file or folder of this kind and version has to be sampled; None where it was not distilled."""
    name = (path.parent.name if path.stem.removesuffix(".fp16") in NAMELESS else path.name).lower()
    if kind == "animatelcm-i2v":
        return ANIMATE_LCM_I2V
    if kind in MOTION_KINDS:
        if version == "animatelcm" or "animatelcm" in name:
            return ANIMATE_LCM
        return lightning(int(steps[1])) if (steps := LIGHTNING.search(name)) else None
    return _of_image_model(kind, name, metadata) if kind in IMAGE_KINDS else None


def _of_image_model(kind: str, name: str, metadata: Mapping[str, str]) -> Distillation | None:
    """The same of an image model, or of a LoRA that makes one of another."""
    if "lora" in kind and (facts := consistency_facts(metadata)):
        return consistency(*facts)
    if steps := HYPER.search(name):
        needs = hyper_sd(int(steps[1]), guided="cfg" in name)
        return needs if "lora" in kind else replace(needs, possible_steps=(needs.steps,))
    if kind in SDXL_KINDS and (steps := LIGHTNING.search(name)):
        needs = lightning(int(steps[1]), "SDXL")
        return replace(needs, prediction_type="sample") if SAMPLE.search(name) else needs
    if kind in SDXL_KINDS and TURBO.search(name):
        return SDXL_TURBO
    return LCM if CONSISTENCY.search(name) else None
