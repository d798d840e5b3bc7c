"""Any supported file or folder as named parts in our grammar: the step between files and modules, or other formats."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from animatediff.checkpoints.diffusers_json import (
    TEXT_STEMS,
    UNET_STEM,
    VAE_STEM,
    adapter_frames,
    adapter_metadata,
    checked_json,
    folder_metadata,
    image_metadata,
)
from animatediff.checkpoints.files import LoadedFile, StateDict, find_weights, read_state_dict
from animatediff.checkpoints.identify import (
    CONDITIONED_MOTION,
    MOTION_KINDS,
    adapter_config,
    folder_kind,
    identify_tensors,
    refusal,
)
from animatediff.checkpoints.keymaps import (
    LDM_BOOKKEEPING,
    LDM_PARTS,
    LDM_UNET,
    LDM_VAE,
    POSITIONAL_ENDINGS,
    UNUSED_TEXT,
    inverted,
    is_motion,
    text_from_open_clip,
    translate,
    unet_layout,
    unet_table,
    vae_attention_spellings,
    vae_layout,
    vae_table,
)
from animatediff.checkpoints.kind_rules import motion_part
from animatediff.checkpoints.metadata import MARKERS, marked
from animatediff.checkpoints.sizes import SDXL_METADATA, adapter_length
from animatediff.utils import UserError

TEXT_FOLDERS = {"text_encoder": "text", "text_encoder_2": "text_2"}  # of a diffusers folder -> field of ImageParts
IMAGE_KINDS = ("sd1-checkpoint", "sdxl-checkpoint")  # that a single file can be
UNET_KINDS = ("sd1-unet", "sdxl-unet")
FOLDER_KINDS = ("sd1-unet", "sdxl-unet", "motion-adapter", "motion-module")  # that a folder's unet/ can be
VAE_ATTENTION_MATRIX = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight")


CONDITION_PREFIXES = ("conv_in.", "img_encoder.")  # what is for a picture in PIA's and AnimateLCM-I2V's files


@dataclass(frozen=True)
class ImageParts:
    """The networks of an image model in our names. `stated`: what the file says that shapes cannot tell (see sizes.py).

    `text_2` is SDXL's second text encoder, the only one of its refiner.
    """

    path: Path
    kind: str
    unet: StateDict
    vae: StateDict | None
    text: StateDict | None
    text_2: StateDict | None
    stated: dict[str, str]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def metadata(self) -> dict[str, str]:
        """What is stated, and for the rest what is usual in the family."""
        return (SDXL_METADATA if self.kind.startswith("sdxl") else {}) | self.stated


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
    frames where that tells something about the version. `condition` is what PIA's and AnimateLCM-I2V's files hold for a
    picture.
    """

    path: Path
    kind: str
    tensors: StateDict
    positional: StateDict
    length: int | None
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    condition: StateDict = field(default_factory=dict)


def read_image_parts(path: str | Path) -> ImageParts:
    """Read a single file (LDM keys) or diffusers folder of SD 1.x or SDXL.

    Raises:
        UserError: it is something else (named), damaged, or has entries that belong to no known network.
    """
    path = Path(path)
    weights = path
    if path.is_dir():
        weights = find_weights(path, UNET_STEM, UNET_STEM)
        if weights is None or (path / "unet").is_dir():
            return _read_diffusers(path)
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind in UNET_KINDS and not any(key.startswith(LDM_UNET) for key in file.tensors):
        config = checked_json("unet", weights.with_name("config.json")) if path.is_dir() else {}
        metadata = file.metadata | image_metadata(unet=config)
        notes = [*file.notes, "a UNet alone, the rest is a base model's"]
        return ImageParts(path, info.kind, file.tensors, None, None, None, metadata, notes)
    if info.kind not in (*IMAGE_KINDS, *UNET_KINDS):
        raise refusal(info, "an image model")
    return _split_ldm(file, info.kind)


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
    if info.kind not in ("vae", *IMAGE_KINDS):
        raise refusal(info, "a VAE")
    notes = list(file.notes)
    if any(key.startswith("encoder.down_blocks.") for key in file.tensors):
        config = checked_json("vae", weights.with_name("config.json"))
        metadata = image_metadata(vae=config) | file.metadata
        return VAEParts(path, _vae_from_diffusers(file.tensors), metadata, notes)
    if info.kind == "vae":
        file = replace(file, tensors={_below_vae(key): t for key, t in file.tensors.items()})
    parts = _split_ldm(file, info.kind)
    if parts.vae is None:
        raise UserError(f"got {path}, an image model without a VAE, expected one: choose another file")
    if parts.unet:
        notes.append("of a whole image model the VAE alone is used")
    return VAEParts(path, parts.vae, parts.metadata, notes, parts.unused)


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
        raise refusal(info, "a motion module")
    notes, motion = list(file.notes), motion_part(file.tensors)
    tensors = {key: t for key, t in motion.items() if not key.endswith(POSITIONAL_ENDINGS)}
    positional = {key: t for key, t in motion.items() if key not in tensors}
    unused = [key for key in file.tensors if not is_motion(key)]
    if unused and info.kind in MOTION_KINDS:
        notes.append(f"the file holds more than a motion module: {len(unused)} other entries not used")
    if positional:
        notes.append("positional encodings are computed, the file's were not loaded")
    metadata, length = file.metadata, info.positional_length
    if info.kind == "motion-adapter":
        config = adapter_config(weights)
        metadata = adapter_metadata(config) | metadata
        length = adapter_length(tensors, length or adapter_frames(config))
    condition: StateDict = {}
    if info.kind in CONDITIONED_MOTION:  # which load_motion_condition loads
        metadata = adapter_metadata(adapter_config(weights)) | metadata | {"version": CONDITIONED_MOTION[info.kind]}
        condition = {key: t for key, t in file.tensors.items() if key.startswith(CONDITION_PREFIXES)}
        unused = [key for key in unused if key not in condition]
    return MotionParts(path, info.kind, tensors, positional, length, metadata, notes, unused, condition)


# --- single files ----------------------------------------------------------------------------------------------------


def _split_ldm(file: LoadedFile, kind: str) -> ImageParts:
    groups: dict[str, StateDict] = {prefix: {} for prefix in LDM_PARTS}
    bookkeeping, strangers, metadata = [], [], marked(file.tensors, file.metadata)
    for key, tensor in file.tensors.items():
        prefix = next((p for p in groups if key.startswith(p)), None)
        if LDM_BOOKKEEPING.fullmatch(key):
            bookkeeping.append(key)
        elif key in MARKERS:
            continue
        elif prefix is None:
            strangers.append(key)
        else:
            groups[prefix][key[len(prefix) :]] = tensor
    parts, unused = {name: {} for name in LDM_PARTS.values()}, bookkeeping
    for prefix, tensors in groups.items():
        name = LDM_PARTS[prefix]
        if prefix in TABLES:
            renamed, unknown = _renamed(tensors, TABLES[prefix](tensors))
            strangers += [prefix + key for key in unknown]
        else:
            renamed, unknown = _canonical_text(tensors) if name == "text" else (text_from_open_clip(tensors), [])
            unused += [prefix + key for key in unknown]
        parts[name] |= renamed
    if strangers:
        raise UserError(
            f"got {file.path} with {len(strangers)} entries that belong to no part of an image model "
            f"({', '.join(sorted(strangers)[:3])}), expected one of SD 1.x or SDXL: choose another file"
        )
    notes = list(file.notes)
    if any(key.startswith("model_ema.") for key in bookkeeping):
        notes.append("EMA copies not used")
    return ImageParts(
        path=file.path,
        kind=kind,
        unet=parts["unet"],
        vae=_squeezed(parts["vae"]) or None,
        text=parts["text"] or None,
        text_2=parts["text_2"] or None,
        stated=metadata,
        notes=notes,
        unused=unused,
    )


def _unet_from_ldm(tensors: StateDict) -> dict[str, str]:
    layers, attention_levels = unet_layout(tensors)
    return inverted(unet_table(layers=layers, attention_levels=attention_levels))


def _vae_from_ldm(tensors: StateDict) -> dict[str, str]:
    levels, layers = vae_layout(tensors)
    return vae_attention_spellings() | inverted(vae_table(levels=levels, layers=layers))


# Below these prefixes the names differ from ours.
TABLES = {LDM_UNET: _unet_from_ldm, LDM_VAE: _vae_from_ldm}


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


def _canonical_text(tensors: StateDict, *, projection: bool = False) -> tuple[StateDict, list[str]]:
    """With the `text_model.` level that some files lack, without what SD does not use (returned by name)."""
    own = {"text_projection.weight"} if projection else set()
    unused = [key for key in tensors if UNUSED_TEXT.fullmatch(key) and key not in own]
    kept = {key: t for key, t in tensors.items() if key not in unused}
    named = {key if key.startswith("text_model.") or key in own else f"text_model.{key}": t for key, t in kept.items()}
    return named, unused


# --- diffusers folders -----------------------------------------------------------------------------------------------


def _read_diffusers(path: Path) -> ImageParts:
    unet_file = _read_part(path, "unet", UNET_STEM)
    if unet_file is None:
        raise UserError(
            f"got the folder {path}, expected a diffusers model: there is no unet/{UNET_STEM}.safetensors (or .bin)"
        )
    info = identify_tensors(unet_file.tensors, unet_file.metadata, path=path)
    if info.kind not in FOLDER_KINDS:
        raise refusal(info, "an image model")
    found = {"unet": unet_file, "vae": _read_part(path, "vae", VAE_STEM)}
    found |= {name: _read_part(path, name, *TEXT_STEMS) for name in TEXT_FOLDERS}
    files = {name: file for name, file in found.items() if file}
    metadata = unet_file.metadata | folder_metadata(path)
    notes = [f"{file.path.relative_to(path)}: {note}" for file in files.values() for note in file.notes]
    names = [file.path.name for file in files.values()]
    notes += [f"only the fp16 variant {name} is there" for name in names if ".fp16." in name]
    unused = [key for key in unet_file.tensors if is_motion(key)]
    motion = set(unused)
    if motion:
        notes.append("unet/ holds a motion module too, which is not part of the image model")
    texts: dict[str, StateDict | None] = dict.fromkeys(TEXT_FOLDERS.values())
    for folder, name in TEXT_FOLDERS.items():
        if folder in files:
            texts[name], unused_text = _canonical_text(files[folder].tensors, projection=name == "text_2")
            unused += [f"{folder}/{key}" for key in unused_text]
    return ImageParts(
        path=path,
        kind=folder_kind(unet_file.tensors),
        unet={key: t for key, t in unet_file.tensors.items() if key not in motion},
        vae=_vae_from_diffusers(files["vae"].tensors) if "vae" in files else None,
        **texts,
        stated=metadata,
        notes=notes,
        unused=unused,
    )


def _vae_from_diffusers(tensors: StateDict) -> StateDict:
    return _squeezed({translate(key, vae_attention_spellings()) or key: t for key, t in tensors.items()})


def _read_part(path: Path, name: str, stem: str, pickle_stem: str | None = None) -> LoadedFile | None:
    weights = find_weights(path / name, stem, pickle_stem or stem)
    return read_state_dict(weights) if weights else None
