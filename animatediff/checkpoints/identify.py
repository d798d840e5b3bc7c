"""What is this weight file? Its kind by its keys, its version and base by its shapes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from animatediff.checkpoints import sizes
from animatediff.checkpoints.diffusers_json import (
    TEXT_STEMS,
    UNET_STEM,
    VAE_STEM,
    Json,
    adapter_frames,
    adapter_metadata,
    folder_metadata,
    optional_json,
)
from animatediff.checkpoints.distilled import MOTION_KINDS, distillation_of
from animatediff.checkpoints.file_kinds import KINDS
from animatediff.checkpoints.files import LoadedFile, StateDict, find_weights, read_json, read_state_dict
from animatediff.checkpoints.keymaps import LDM_UNET, MOTION_MARK, REFINER_TEXT_2
from animatediff.checkpoints.kind_rules import motion_part
from animatediff.checkpoints.lora_keys import LORA_STEMS, lora_algorithms, lora_base, unsupported_lora
from animatediff.checkpoints.metadata import marked, schedule_facts
from animatediff.config.networks import Distillation
from animatediff.utils import UserError, naming

SD15_WIDTHS = (320, 640, 1280, 1280)
SD15_CONTEXT = 768
SDXL_WIDTHS = (320, 640, 1280)
SDXL_VERSIONS = ("sdxl-beta", "hotshot-xl")
_SCHEDULED = ("sd1-checkpoint", "sdxl-checkpoint", "sd1-unet", "sdxl-unet")
CONDITIONED_MOTION = {"pia": "pia", "animatelcm-i2v": "animatelcm"}  # with a network for a picture -> motion version


@dataclass(frozen=True)
class FileInfo:
    """The findings about one file or folder.

    `kind` is a key of KINDS, `version` a motion version or a variant's name, `base` the model family it belongs to,
    `dtype` the weights' type or types, `notes` what reading it removed.
    """

    path: Path
    kind: str
    version: str | None
    base: str
    dtype: str
    num_tensors: int
    num_parameters: int
    positional_length: int | None
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # of a motion module's version, where the file does not tell
    evidence: str = ""  # of a motion module's version
    schedule: Mapping[str, Any] = field(
        default_factory=dict
    )  # what it says of the noise schedule: see `schedule_facts`

    @property
    def summary(self) -> str:
        if self.kind == "unsupported-lora" and self.version:
            return self.version
        return KINDS[self.kind].summary

    @property
    def needs(self) -> str:
        return KINDS[self.kind].needs.format(base=self.base)

    @property
    def supported(self) -> bool:
        return bool(KINDS[self.kind].config)

    @property
    def distillation(self) -> Distillation | None:
        """How it has to be sampled, if it was distilled to few steps."""
        return distillation_of(self.kind, self.version, self.path, self.metadata)

    @property
    def config_line(self) -> str:
        """The line of a prompt config that uses the file, or why none does."""
        line = KINDS[self.kind].config.format(path=_yaml(str(self.path)))
        if self.kind in MOTION_KINDS and self.version is None:
            line += f"\nversion: {' or '.join(self.candidates)}   # the file does not tell"
        return line or f"none: {self.summary} cannot be used here"


def _yaml(text: str) -> str:
    """A text as a YAML value, quoted where it has to be."""
    return (
        text
        if re.fullmatch(r"[\w./\\~+@]([\w./\\~+@ -]*[\w./\\~+@-])?", text)
        else json.dumps(text, ensure_ascii=False)
    )


def identify(path: str | Path) -> FileInfo:
    """Say what a weight file or model folder is; `kind` is "unknown" where nothing fits.

    Raises:
        UserError: the file cannot be read (missing, damaged, no weights, needs code to be executed).
    """
    path = Path(path)
    if path.is_dir():
        return _identify_folder(path)
    return _identify_file(path, read_state_dict(path))


def adapter_config(weights: Path) -> Json:
    """The config.json beside the weights of a diffusers motion adapter, empty where there is none."""
    path = weights.with_name("config.json")
    config = optional_json(path)
    return config if config.get("_class_name") in ("MotionAdapter", "UNetMotionModel") else {}


def _identify_file(path: Path, file: LoadedFile) -> FileInfo:
    info = identify_tensors(file.tensors, file.metadata, path=path, notes=file.notes)
    if info.kind == "motion-adapter" and (config := adapter_config(file.path)):
        metadata = adapter_metadata(config) | file.metadata
        length = info.positional_length or adapter_frames(config)
        return identify_tensors(file.tensors, metadata, path=path, notes=file.notes, length=length)
    return info


def identify_tensors(
    tensors: StateDict,
    metadata: Mapping[str, str] | None = None,
    *,
    path: Path,
    notes: tuple[str, ...] = (),
    length: int | None = None,
) -> FileInfo:
    """As `identify`, of a state dict as `read_state_dict` returns it.

    Args:
        length: frames of the positional encoding, where something other than the tensors tells.
    """
    metadata = dict(metadata or {})
    kind = _kind(tuple((key, t.shape) for key, t in tensors.items()))
    length = length or sizes.positional_length(tensors)
    with naming(path):
        version, evidence = _version(kind, tensors, metadata, length)
        schedule = schedule_facts(marked(tensors, metadata)) if kind in _SCHEDULED else {}
    return FileInfo(
        path=path,
        kind=kind,
        version=version,
        base=_base(kind, tensors, version, metadata),
        **_totals(tensors),
        positional_length=length,
        metadata=metadata,
        notes=notes,
        candidates=sizes.candidate_versions(motion_part(tensors)) if kind in MOTION_KINDS else (),
        evidence=evidence,
        schedule=schedule,
    )


@functools.lru_cache(maxsize=16)
def _kind(shapes: tuple[tuple[str, torch.Size], ...]) -> str:
    """The first of KINDS that fits. Names and shapes decide, so a file is told once, when checked and when loaded."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes}
    return next(name for name, row in KINDS.items() if row.fits(tensors))


def _totals(tensors: StateDict) -> dict[str, Any]:
    return {
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "num_tensors": len(tensors),
        "num_parameters": sum(t.numel() for t in tensors.values()),
    }


def refusal(info: FileInfo, expected: str) -> UserError:
    """The error for a file of another kind than `expected` (with its article: "a motion module")."""
    advice = "choose another file"
    if info.supported:
        lines = [line.split("   #")[0] for line in info.config_line.splitlines()]
        advice = f"use it as {' and '.join(f'`{line}`' for line in lines)}"
    elif info.kind == "unknown":
        advice = "its keys are of no known format; choose another file"
    elif info.needs:
        advice = f"it needs {info.needs}"
    return UserError(f"{info.path}: this is {info.summary}, not {expected}: {advice}")


def _version(kind: str, tensors: StateDict, metadata: dict[str, str], length: int | None) -> tuple[str | None, str]:
    """A version or variant, and of a motion module why it is that one."""
    if kind in CONDITIONED_MOTION:
        return CONDITIONED_MOTION[kind], "it is the only one"
    if kind in MOTION_KINDS:
        motion = motion_part(tensors)
        if kind == "motion-adapter":
            length = sizes.adapter_length(motion, length)
        return sizes.detect_version(motion, metadata, length=length)
    if kind == "sdxl-checkpoint":
        return "refiner" if any(key.startswith(REFINER_TEXT_2) for key in tensors) else None, ""
    if kind == "sparsectrl":
        return "scribble" if "controlnet_cond_embedding.conv_in.weight" in tensors else "rgb", ""
    if kind == "unsupported-lora":
        return unsupported_lora(tensors), ""
    if "lora" in kind:
        return ", ".join(sorted(lora_algorithms(tensors))), ""
    return None, ""


def _base(kind: str, tensors: StateDict, version: str | None, metadata: Mapping[str, str]) -> str:
    """The model family, with the widths where they are not SD 1.5's."""
    sdxl_motion = kind in MOTION_KINDS and _unet_widths(tensors) == SDXL_WIDTHS
    if kind.startswith("sdxl") or version in SDXL_VERSIONS or sdxl_motion:
        return "SDXL"
    if kind.startswith("sd2"):
        return "SD 2.x"
    if kind == "rife":
        return "none: it sees pictures alone"
    if not KINDS[kind].config:
        return "not told by the file"
    if kind == "ip-adapter":
        keys = next((t for key, t in tensors.items() if key.endswith(".to_k_ip.weight") and t.dim() == 2), None)
        return "SD 1.x" if keys is not None and keys.shape[1] == SD15_CONTEXT else "not told by the file"
    if kind == "lora":
        return lora_base(tensors, metadata) or "not told by the file"
    widths = _unet_widths(tensors)
    return "SD 1.x" if not widths or widths == SD15_WIDTHS else f"SD 1.x layout of widths {', '.join(map(str, widths))}"


def _unet_widths(tensors: StateDict) -> tuple[int, ...]:
    tensors = motion_part(tensors) or tensors
    if any(key.startswith(LDM_UNET) for key in tensors):
        pattern = re.compile(rf"{re.escape(LDM_UNET)}input_blocks\.(\d+)\.0\.out_layers\.3\.bias")
    elif any(MOTION_MARK in key for key in tensors):
        pattern = re.compile(r"down_blocks\.(\d+)\.motion_modules\.0\.temporal_transformer\.norm\.bias")
    else:
        pattern = re.compile(r"down_blocks\.(\d+)\.resnets\.0\.conv1\.bias")
    matches = [(pattern.fullmatch(key), t) for key, t in tensors.items()]
    found = {int(m[1]): t.shape[0] for m, t in matches if m and t.dim() == 1}
    order = sorted(found)
    if any(key.startswith(LDM_UNET) for key in tensors):  # every level starts after a gap left by its downsampler
        order = [i for i in order if i - 1 not in found]
    return tuple(found[i] for i in order)


# --- folders ---------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """The file itself, or the weight files of a diffusers folder's parts (UNet first) or of an adapter's folder.

    Raises:
        UserError: a folder without any.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    parts = [(path / "unet", UNET_STEM, UNET_STEM), (path / "vae", VAE_STEM, VAE_STEM)]
    parts += [(path / name, *TEXT_STEMS) for name in ("text_encoder", "text_encoder_2")]
    if not (path / "unet").is_dir():
        parts = [(path, stem, stem) for stem in (UNET_STEM, *LORA_STEMS)] + [(path, *TEXT_STEMS)]
    if found := [weights for part in parts if (weights := find_weights(*part))]:
        return found
    name = read_json(path / "model_index.json").get("_class_name") if (path / "model_index.json").is_file() else None
    what = f"a {name} without unet/ weights" if name else "no model_index.json, no unet/ and no weights"
    raise UserError(f"got the folder {path} with {what}, expected a diffusers model: give a complete folder or a file")


def folder_kind(unet: StateDict) -> str:
    """What a diffusers folder is by the names of its UNet, which may have motion modules in it, as Hotshot-XL's."""
    return "sdxl-checkpoint" if any(key.startswith("add_embedding.") for key in unet) else "diffusers-folder"


def _identify_folder(path: Path) -> FileInfo:
    first, *others = weight_files(path)
    file = read_state_dict(first)
    info = _identify_file(path, file)
    if first.parent == path or info.kind not in ("sd1-unet", "sdxl-unet", *MOTION_KINDS):
        return info
    sizes_of_all = _totals(
        {f"{p.parent.name}/{k}": t for p in (first, *others) for k, t in read_state_dict(p).tensors.items()}
    )
    told = {"schedule": schedule_facts(folder_metadata(path)), **sizes_of_all}
    kind, has_first = folder_kind(file.tensors), any(p.parent.name == "text_encoder" for p in others)
    version = "refiner" if kind == "sdxl-checkpoint" and not has_first else None
    return replace(info, kind=kind, version=version, **told)
