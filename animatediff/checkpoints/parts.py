"""Any supported file or folder as named parts in our grammar: the step between files and modules, or other formats."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from animatediff.checkpoints.diffusers_json import (
    TEXT_STEMS,
    UNET_STEM,
    VAE_STEM,
    Json,
    adapter_metadata,
    image_metadata,
)
from animatediff.checkpoints.files import LoadedFile, StateDict, find_weights, read_json, read_state_dict
from animatediff.checkpoints.identify import (
    CONDITIONED_MOTION,
    MOTION_KINDS,
    adapter_config,
    identify_tensors,
    motion_part,
    refusal,
)
from animatediff.checkpoints.keymaps import (
    LDM_BOOKKEEPING,
    LDM_TEXT,
    LDM_UNET,
    LDM_VAE,
    MOTION_MARK,
    UNUSED_TEXT,
    inverted,
    translate,
    unet_layout,
    unet_table,
    vae_attention_spellings,
    vae_layout,
    vae_table,
)
from animatediff.checkpoints.sizes import adapter_length
from animatediff.utils import UserError

PE_ENDINGS = (".pos_encoder.pe", ".pos_embed.pe")
VAE_ATTENTION_MATRIX = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight")


@dataclass(frozen=True)
class ImageParts:
    """The networks of an image model in our names. `metadata` is what shapes cannot tell (see sizes.py)."""

    path: Path
    kind: str
    unet: StateDict
    vae: StateDict | None
    text: StateDict | None
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VAEParts:
    """A VAE in our names. `metadata` is what shapes cannot tell (see sizes.py)."""

    path: Path
    tensors: StateDict
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MotionParts:
    """A motion module in official names.

    `positional` holds its positional encodings, which are computed and never loaded; `length` is their number of
    frames where that tells something about the version.
    """

    path: Path
    kind: str
    tensors: StateDict
    positional: StateDict
    length: int | None
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def read_image_parts(path: str | Path) -> ImageParts:
    """Read an SD 1.x single file (LDM keys) or diffusers folder.

    Raises:
        UserError: it is something else (named), damaged, or has entries that belong to no known network.
    """
    path = Path(path)
    if path.is_dir():
        return _read_diffusers(path)
    file = read_state_dict(path)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind != "sd1-checkpoint":
        raise refusal(info, "an SD 1.x image model")
    return _split_ldm(file)


def read_vae_parts(path: str | Path) -> VAEParts:
    """Read a VAE alone (LDM or diffusers names, with its config.json), or the VAE of a whole image model.

    Raises:
        UserError: it is something else (named), damaged, or an image model without a VAE.
    """
    path = Path(path)
    places = (path / "vae", path) if path.is_dir() else ()
    weights = next((found for folder in places if (found := find_weights(folder, VAE_STEM, VAE_STEM))), path)
    if weights.is_dir():
        raise UserError(f"got the folder {path}, expected a VAE: it has no {VAE_STEM} file, and none in vae/")
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind not in ("vae", "sd1-checkpoint"):
        raise refusal(info, "a VAE")
    notes = list(file.notes)
    if any(key.startswith("encoder.down_blocks.") for key in file.tensors):
        config = _optional_json(weights.with_name("config.json"))
        metadata = image_metadata(unet={}, vae=config, text={}, scheduler={}) | file.metadata
        return VAEParts(path, _vae_from_diffusers(file.tensors), metadata, notes)
    if info.kind == "vae":
        file = replace(file, tensors={_below_vae(key): t for key, t in file.tensors.items()})
    parts = _split_ldm(file)
    if parts.vae is None:
        raise UserError(f"got {path}, an image model without a VAE, expected one: choose another file")
    if parts.unet:
        notes.append("of a whole image model the VAE alone is used")
    return VAEParts(path, parts.vae, file.metadata, notes, parts.unused)


def read_motion_parts(path: str | Path) -> MotionParts:
    """Read a motion module: official file, training checkpoint of a whole UNet, MotionAdapter file or folder.

    Raises:
        UserError: it is something else (named) or damaged.
    """
    path = Path(path)
    folder = next((f for f in (path / "motion_adapter", path) if (f / "config.json").is_file()), path)
    weights = find_weights(folder, UNET_STEM, UNET_STEM) if path.is_dir() else path
    if weights is None:
        raise UserError(f"got the folder {path}, expected a motion module: it has no {UNET_STEM} file")
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind not in (*MOTION_KINDS, *CONDITIONED_MOTION):
        raise refusal(info, "a motion module for SD 1.x")
    notes, motion = list(file.notes), motion_part(file.tensors)
    tensors = {key: t for key, t in motion.items() if not key.endswith(PE_ENDINGS)}
    positional = {key: t for key, t in motion.items() if key not in tensors}
    unused = [key for key in file.tensors if MOTION_MARK not in key]
    if unused and info.kind in MOTION_KINDS:
        notes.append(f"the file holds more than a motion module: {len(unused)} other entries not used")
    if positional:
        notes.append("positional encodings are computed, the file's were not loaded")
    metadata, length = file.metadata, info.positional_length
    if info.kind == "motion-adapter":
        config = adapter_config(weights)
        metadata = adapter_metadata(config) | metadata
        length = adapter_length(tensors, length or config.get("motion_max_seq_length"))
    if info.kind in CONDITIONED_MOTION:  # the rest is for load_motion_condition
        metadata, unused = adapter_metadata(adapter_config(weights)) | metadata, []
        metadata |= {"version": CONDITIONED_MOTION[info.kind]}
    return MotionParts(path, info.kind, tensors, positional, length, metadata, notes, unused)


# --- single files ----------------------------------------------------------------------------------------------------


def _split_ldm(file: LoadedFile) -> ImageParts:
    groups: dict[str, StateDict] = {LDM_UNET: {}, LDM_VAE: {}, LDM_TEXT: {}}
    bookkeeping, strangers = [], []
    for key, tensor in file.tensors.items():
        prefix = next((p for p in groups if key.startswith(p)), None)
        if LDM_BOOKKEEPING.fullmatch(key):
            bookkeeping.append(key)
        elif prefix is None:
            strangers.append(key)
        else:
            groups[prefix][key[len(prefix) :]] = tensor
    text, unused_text = _canonical_text(groups[LDM_TEXT])
    unused = bookkeeping + [LDM_TEXT + key for key in unused_text]
    unet, unknown_unet = _renamed(groups[LDM_UNET], _unet_from_ldm(groups[LDM_UNET]))
    vae, unknown_vae = _renamed(groups[LDM_VAE], _vae_from_ldm(groups[LDM_VAE]))
    strangers += [LDM_UNET + key for key in unknown_unet] + [LDM_VAE + key for key in unknown_vae]
    if strangers:
        raise UserError(
            f"got {file.path} with {len(strangers)} entries that belong to no part of SD 1.x "
            f"({', '.join(sorted(strangers)[:3])}), expected an SD 1.x image model: choose another file"
        )
    notes = list(file.notes)
    if any(key.startswith("model_ema.") for key in bookkeeping):
        notes.append("EMA copies not used")
    return ImageParts(
        path=file.path,
        kind="sd1-checkpoint",
        unet=unet,
        vae=_squeezed(vae) or None,
        text=text or None,
        metadata=file.metadata,
        notes=notes,
        unused=unused,
    )


def _unet_from_ldm(tensors: StateDict) -> dict[str, str]:
    layers, attention_levels = unet_layout(tensors)
    return inverted(unet_table(layers=layers, attention_levels=attention_levels))


def _vae_from_ldm(tensors: StateDict) -> dict[str, str]:
    levels, layers = vae_layout(tensors)
    return vae_attention_spellings() | inverted(vae_table(levels=levels, layers=layers))


def _below_vae(key: str) -> str:
    """The name of an entry of a VAE's own file as a whole model has it."""
    return key if key.startswith(LDM_VAE) or LDM_BOOKKEEPING.fullmatch(key) else LDM_VAE + key


def _renamed(tensors: StateDict, table: dict[str, str]) -> tuple[StateDict, list[str]]:
    """The tensors under their new names, and the names that the table does not know."""
    names = {key: translate(key, table) for key in tensors}
    return {new: tensors[key] for key, new in names.items() if new}, [key for key, new in names.items() if not new]


def _squeezed(vae: StateDict) -> StateDict:
    """The attention's 1x1 convolutions as the matrices that they are."""
    return {key: t.flatten(1) if VAE_ATTENTION_MATRIX.fullmatch(key) else t for key, t in vae.items()}


def _canonical_text(tensors: StateDict) -> tuple[StateDict, list[str]]:
    """With the `text_model.` level that some files lack, without what SD does not use (returned by name)."""
    unused = [key for key in tensors if UNUSED_TEXT.fullmatch(key)]
    kept = {key: t for key, t in tensors.items() if key not in unused}
    return {key if key.startswith("text_model.") else f"text_model.{key}": t for key, t in kept.items()}, unused


# --- diffusers folders -----------------------------------------------------------------------------------------------


def _read_diffusers(path: Path) -> ImageParts:
    unet_file = _read_part(path, "unet", UNET_STEM)
    if unet_file is None:
        raise UserError(
            f"got the folder {path}, expected a diffusers model: there is no unet/{UNET_STEM}.safetensors (or .bin)"
        )
    info = identify_tensors(unet_file.tensors, unet_file.metadata, path=path)
    if info.kind not in ("sd1-unet", "motion-adapter", "motion-module"):
        raise refusal(info, "an SD 1.x image model")
    vae_file = _read_part(path, "vae", VAE_STEM)
    text_file = _read_part(path, "text_encoder", *TEXT_STEMS)
    configs = {name: _optional_json(path / name / "config.json") for name in ("unet", "vae", "text_encoder")}
    metadata = unet_file.metadata | image_metadata(
        unet=configs["unet"],
        vae=configs["vae"],
        text=configs["text_encoder"],
        scheduler=_optional_json(path / "scheduler" / "scheduler_config.json"),
    )
    files = [file for file in (unet_file, vae_file, text_file) if file]
    notes = [f"{file.path.relative_to(path)}: {note}" for file in files for note in file.notes]
    notes += [f"only the fp16 variant {file.path.name} is there" for file in files if ".fp16." in file.path.name]
    unused = [key for key in unet_file.tensors if MOTION_MARK in key]
    if unused:
        notes.append("unet/ holds a motion module too, which is not part of the image model")
    vae = text = None
    if vae_file:
        vae = _vae_from_diffusers(vae_file.tensors)
    if text_file:
        text, unused_text = _canonical_text(text_file.tensors)
        unused += [f"text_encoder/{key}" for key in unused_text]
    return ImageParts(
        path=path,
        kind="diffusers-folder",
        unet={key: t for key, t in unet_file.tensors.items() if MOTION_MARK not in key},
        vae=vae,
        text=text,
        metadata=metadata,
        notes=notes,
        unused=unused,
    )


def _vae_from_diffusers(tensors: StateDict) -> StateDict:
    return _squeezed({translate(key, vae_attention_spellings()) or key: t for key, t in tensors.items()})


def _read_part(path: Path, name: str, stem: str, pickle_stem: str | None = None) -> LoadedFile | None:
    weights = find_weights(path / name, stem, pickle_stem or stem)
    return read_state_dict(weights) if weights else None


def _optional_json(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}
