"""Modules and parts to files: LDM single files, official motion modules, diffusers folders and MotionAdapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from animatediff.checkpoints import diffusers_json as dj
from animatediff.checkpoints.diffusers_folders import model_folder, write_json, write_part
from animatediff.checkpoints.files import StateDict, write_state_dict
from animatediff.checkpoints.keymaps import (
    LDM_TEXT,
    LDM_UNET,
    LDM_VAE,
    MOTION_MARK,
    REFINER_TEXT_2,
    SDXL_TEXT,
    SDXL_TEXT_2,
    motion_to_diffusers,
    motion_to_hotshot,
    positions_to_diffusers,
    positions_to_official,
    text_to_open_clip,
    translate,
    unet_table,
    vae_table,
)
from animatediff.checkpoints.metadata import motion_norm_groups, prediction_type, schedule_facts, schedule_metadata
from animatediff.checkpoints.parts import VAE_ATTENTION_MATRIX, ImageParts, MotionParts, VAEParts
from animatediff.checkpoints.sizes import (
    image_metadata_of,
    motion_config,
    motion_levels,
    motion_metadata_of,
    motion_widths,
    text_config,
    unet_config,
    vae_config,
    vae_metadata_of,
)
from animatediff.config.networks import MotionConfig, ScheduleConfig, TextConfig
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import END, START, build_vocabulary, read_bundled_merges
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError


class HasImageModel(Protocol):
    """What `save_image_model` needs; `load.ImageModel` is one. SDXL has a `text_encoder_2` as well."""

    unet: UNet
    vae: VAE | None
    text_encoder: TextEncoder | None
    schedule: ScheduleConfig | None


def save_image_model(
    model: HasImageModel,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a single file (LDM keys) that `load_base` reads back without further information.

    Args:
        model: a UNet (its motion modules are left out), text encoders, perhaps a VAE and a schedule.
        path: `.safetensors`, or `.ckpt`, `.pt`, `.pth`.
        metadata: strings to add; heads, scaling factor and schedule are written by themselves.
        dtype: to store the weights in, their own by default.
    """
    vae_sizes = model.vae.config if model.vae else None
    encoders = {"text": model.text_encoder, "text_2": getattr(model, "text_encoder_2", None)}
    sizes = [encoder and encoder.config for encoder in encoders.values()]
    facts = image_metadata_of(model.unet.config, vae_sizes, *sizes)
    facts |= schedule_metadata(model.schedule or ScheduleConfig())
    parts = ImageParts(
        path=Path(path),
        kind="sdxl-checkpoint" if encoders["text_2"] else "sd1-checkpoint",
        unet={k: t for k, t in _weights(model.unet, dtype).items() if MOTION_MARK not in k},
        vae=_weights(model.vae, dtype) if model.vae else None,
        **{name: encoder and _weights(encoder, dtype) for name, encoder in encoders.items()},
        stated={**(metadata or {}), **facts},
    )
    return write_ldm(parts, path)


def save_vae(
    vae: VAE, path: str | Path, *, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write a VAE alone in LDM keys; `load_vae` reads it back without further information.

    Args:
        path: `.safetensors`, or `.ckpt`, `.pt`, `.pth`.
        metadata: strings to add; scaling factor and norm groups are written by themselves.
        dtype: to store the weights in, their own by default.
    """
    facts = {**(metadata or {}), **vae_metadata_of(vae.config)}
    return write_vae(VAEParts(Path(path), _weights(vae, dtype), facts), path)


def write_vae(parts: VAEParts, path: str | Path) -> Path:
    """Write a VAE alone in LDM keys without prefix, or as a diffusers folder where `path` has no suffix."""
    path, config = Path(path), vae_config(parts.tensors, parts.metadata)
    facts = parts.metadata | vae_metadata_of(config)
    if path.suffix:
        named = _vae_to_ldm(parts.tensors, facts, parts.path)
        bare = {key.removeprefix(LDM_VAE): t for key, t in named.items()}
        return write_state_dict(path, bare, metadata=facts)
    with model_folder(path) as folder:
        write_part(folder, parts.tensors, dj.vae_json(config), metadata=facts)
    return path


def save_motion_module(
    unet: UNet,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    condition: StateDict | None = None,
) -> Path:
    """Write the motion module of a video UNet in official keys; `load_motion_module` reads it back by itself.

    Args:
        unet: its `config.motion` may not be None.
        condition: what PIA's and AnimateLCM-I2V's files hold besides, see `motion_condition_files`.
        path: `.safetensors`, or `.ckpt`, `.pt`, `.pth`.
        metadata: strings to add; version, heads and trained length are written by themselves.
        dtype: to store the weights in, their own by default.

    Raises:
        UserError: `unet` has no motion module.
    """
    if unet.config.motion is None:
        raise UserError("got an image UNet, expected one with a motion module: load or build one first")
    tensors = {k: t for k, t in _weights(unet, dtype).items() if MOTION_MARK in k}
    tensors |= {k: t.detach().to(dtype or t.dtype) for k, t in (condition or {}).items()}
    facts = motion_metadata_of(unet.config.motion, norm_num_groups=unet.config.norm_num_groups)
    return write_state_dict(path, tensors, metadata={**(metadata or {}), **facts})


def _weights(module: torch.nn.Module, dtype: torch.dtype | None) -> StateDict:
    return {key: tensor.to(dtype or tensor.dtype) for key, tensor in module.state_dict().items()}


# --- image models ----------------------------------------------------------------------------------------------------


def write_ldm(parts: ImageParts, path: str | Path) -> Path:
    """Write an image model as a single file of SD 1.x or SDXL, every tensor in its dtype.

    Raises:
        UserError: the suffix or the folder is unusable, or weights have no name in that grammar.
    """
    unet = unet_config(parts.unet, parts.metadata)
    table = unet_table(layers=unet.layers_per_block, attention_levels=unet.attention_levels)
    tensors = {LDM_UNET + _name(key, table, parts.path): t for key, t in parts.unet.items()}
    if parts.vae:
        tensors |= _vae_to_ldm(parts.vae, parts.metadata, parts.path)
    text, text_2 = parts.text or {}, text_to_open_clip(parts.text_2 or {})
    tensors |= {(SDXL_TEXT if text_2 else LDM_TEXT) + key: t for key, t in text.items()}
    tensors |= {(SDXL_TEXT_2 if text else REFINER_TEXT_2) + key: t for key, t in text_2.items()}
    return write_state_dict(path, tensors, metadata=_facts(parts))


def _vae_to_ldm(tensors: StateDict, metadata: Mapping[str, str], path: Path) -> StateDict:
    vae = vae_config(tensors, metadata)
    table = vae_table(levels=len(vae.block_out_channels), layers=vae.layers_per_block)
    kernels = {key: t[..., None, None] if VAE_ATTENTION_MATRIX.fullmatch(key) else t for key, t in tensors.items()}
    return {LDM_VAE + _name(key, table, path): t for key, t in kernels.items()}


def _name(key: str, table: Mapping[str, str], path: Path) -> str:
    name = translate(key, table)
    if name is None:
        raise UserError(
            f"got {path} with {key}, expected only weights of SD 1.x or SDXL: it cannot be written as a single file"
        )
    return name


def _text_configs(parts: ImageParts) -> dict[str, TextConfig]:
    """Sizes of the text encoders that are there, by the names of their parts."""
    encoders = {name: tensors for name in ("text", "text_2") if (tensors := getattr(parts, name))}
    return {name: text_config(tensors, parts.metadata, name=name) for name, tensors in encoders.items()}


def _facts(parts: ImageParts) -> dict[str, str]:
    """The file's metadata, completed by what other readers would have to guess."""
    texts = _text_configs(parts)
    if not texts:
        return parts.metadata
    unet = unet_config(parts.unet, parts.metadata)
    vae = vae_config(parts.vae, parts.metadata) if parts.vae else None
    facts = parts.metadata | image_metadata_of(unet, vae, texts.get("text"), texts.get("text_2"))
    return facts | ({"prediction_type": prediction} if (prediction := prediction_type(facts)) else {})


def write_diffusers(parts: ImageParts, folder: str | Path) -> Path:
    """Write an image model as a folder that diffusers' pipelines of its kind open, tokenizers included.

    Raises:
        UserError: the VAE or text encoder is missing, its vocabulary is not CLIP's, or `folder` cannot be written.
    """
    texts = _text_configs(parts)
    if parts.vae is None or not texts:
        missing = "VAE" if parts.vae is None else "text encoder"
        raise UserError(
            f"got {parts.path} without a {missing}, expected all parts of an image model: take a complete file"
        )
    unet, vae = unet_config(parts.unet, parts.metadata), vae_config(parts.vae, parts.metadata)
    sdxl, refiner = "text_2" in texts, "text" not in texts
    schedule = ScheduleConfig(
        beta_schedule=parts.metadata.get("beta_schedule", "scaled_linear"),  # as the image models were trained
        set_alpha_to_one=False,
        **schedule_facts(parts.metadata),
    )
    size = 128 if sdxl else 64  # latents; a hint for the default picture size
    numbers = (unet.added_channels - texts["text_2"].projection_width) // (5 if refiner else 6) if sdxl else 0
    unet_json = dj.unet_json(unet, sample_size=size, time_id_channels=numbers)
    scheduler = {"name": "EulerDiscreteScheduler"} if sdxl else {}
    with model_folder(folder) as new:
        write_part(new / "unet", parts.unet, unet_json, metadata=parts.metadata)
        write_part(new / "vae", parts.vae, dj.vae_json(vae, sample_size=size * vae.downsampling))
        for name, config in texts.items():
            ending = name.removeprefix("text")
            encoder = new / f"text_encoder{ending}"
            write_part(encoder, getattr(parts, name), dj.text_json(config), stem=dj.TEXT_STEMS[0])
            _write_tokenizer(new / f"tokenizer{ending}", config, pad_token="!" if ending else END)
        write_json(new / "scheduler" / "scheduler_config.json", dj.scheduler_json(schedule, **scheduler))
        index = dj.sdxl_index_json(refiner=refiner) if sdxl else dj.model_index_json()
        write_json(new / "model_index.json", index)
    return Path(folder)


def _write_tokenizer(folder: Path, config: TextConfig, *, pad_token: str) -> None:
    merges = read_bundled_merges()
    vocabulary = build_vocabulary(merges)
    if config.vocab_size != len(vocabulary):
        raise UserError(
            f"got a text encoder of {config.vocab_size} tokens, expected CLIP's {len(vocabulary)}: "
            "a diffusers folder needs the tokenizer it was trained with"
        )
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    write_json(folder / "vocab.json", vocabulary)
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.max_length,
        "do_lower_case": True,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- motion modules --------------------------------------------------------------------------------------------------


def write_official_motion(parts: MotionParts, path: str | Path, *, version: str | None = None) -> Path:
    """Write a motion module in official keys, with the positional encodings the file came with.

    Args:
        version: as in `load_motion_module`; written into the metadata.

    Raises:
        UserError: the version cannot be told, or contradicts the file.
    """
    config = _motion_sizes(parts, version)
    positional = positions_to_official(parts.positional, config.attentions_per_block)
    tensors = parts.tensors | parts.condition | positional
    return write_state_dict(path, tensors, metadata={**parts.metadata, **motion_metadata_of(config)})


def write_hotshot_motion(parts: MotionParts, path: str | Path, *, version: str | None = None) -> Path:
    """Write Hotshot-XL's motion module in its own keys. Args and Raises as of `write_official_motion`."""
    config = _motion_sizes(parts, version)
    if config.version != "hotshot-xl":
        raise UserError(
            f"got {parts.path}, a {config.version} motion module, expected Hotshot-XL's: choose another format"
        )
    positional = positions_to_official(parts.positional, config.attentions_per_block)
    tensors = {motion_to_hotshot(key): t for key, t in (parts.tensors | positional).items()}
    return write_state_dict(path, tensors, metadata={**parts.metadata, **motion_metadata_of(config)})


def write_motion_adapter(parts: MotionParts, folder: str | Path, *, version: str | None = None) -> Path:
    """Write a motion module as a folder that diffusers' MotionAdapter opens.

    Args:
        version: as in `load_motion_module`; written into the weights' metadata, config.json has no place for it.

    Raises:
        UserError: the version cannot be told or contradicts the file, or MotionAdapter has no such module.
    """
    config = _motion_sizes(parts, version)
    levels = motion_levels(parts.tensors)
    if config.resolutions != tuple(2**i for i in range(levels)) or config.attentions_per_block != 2:
        raise UserError(
            f"got {parts.path} with modules at resolutions {config.resolutions} and {config.attentions_per_block} "
            "attentions each, expected all resolutions and 2: MotionAdapter has no other; keep the official format"
        )
    if parts.kind == "animatelcm-i2v":
        raise UserError(
            f"got {parts.path}, AnimateLCM-I2V's motion module, expected one without a picture, or PIA's: "
            "MotionAdapter has no place for it; keep the official format"
        )
    if not config.tells_positions:
        raise UserError(
            f"got {parts.path}, a module of temporal {config.temporal} without positional encoding, expected attention "
            "with it: MotionAdapter has no other; keep the official format"
        )
    tensors = {motion_to_diffusers(key): t for key, t in parts.tensors.items()}
    tensors |= positions_to_diffusers(parts.positional)
    layers = sum(bool(re.fullmatch(r"down_blocks\.0\.motion_modules\.\d+\.norm\.weight", key)) for key in tensors)
    metadata = {**parts.metadata, **motion_metadata_of(config)}
    adapter = dj.adapter_json(
        config, widths=motion_widths(parts.tensors), layers=layers, groups=motion_norm_groups(metadata)
    )
    if (conv_in := parts.condition.get("conv_in.weight")) is not None:
        tensors, adapter = tensors | parts.condition, {**adapter, "conv_in_channels": conv_in.shape[1]}
    with model_folder(folder) as new:
        write_part(new, tensors, adapter, metadata=metadata)
    return Path(folder)


def _motion_sizes(parts: MotionParts, version: str | None) -> MotionConfig:
    levels = motion_levels(parts.tensors)
    return motion_config(parts.tensors, parts.metadata, levels=levels, length=parts.length, version=version)
