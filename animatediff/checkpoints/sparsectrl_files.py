"""SparseCtrl encoders: official files, diffusers' SparseControlNet files and folders, and our own <-> modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from animatediff.checkpoints.controlnet_files import check_encoder_fits
from animatediff.checkpoints.diffusers_folders import model_folder, write_part
from animatediff.checkpoints.diffusers_json import UNET_STEM, Json, checked_json, sparsectrl_metadata, unet_json
from animatediff.checkpoints.files import (
    StateDict,
    file_sha256,
    find_weights,
    read_state_dict,
    write_state_dict,
)
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.keymaps import (
    MOTION_MARK,
    POSITIONAL_ENDINGS,
    motion_to_diffusers,
    motion_to_official,
    positions_to_diffusers,
    positions_to_official,
)
from animatediff.checkpoints.load import LoadReport, blank, load_strictly
from animatediff.checkpoints.mapped import converted
from animatediff.checkpoints.sizes import sparsectrl_config, sparsectrl_metadata_of
from animatediff.config.networks import SparseCtrlConfig
from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError, naming


@dataclass(frozen=True)
class SparseCtrlParts:
    """A SparseCtrl encoder in official names. `metadata` is what shapes cannot tell (see sizes.py).

    `positional` holds its positional encodings, which are computed and never loaded; `length` is their frames.
    """

    path: Path
    version: str | None
    tensors: StateDict
    positional: StateDict
    length: int | None
    metadata: dict[str, str]
    notes: list[str]
    unused: tuple[str, ...] = ()


def read_sparsectrl_parts(path: str | Path) -> SparseCtrlParts:
    """Read a SparseCtrl encoder: an official file, or one of diffusers' SparseControlNet (file or folder).

    Raises:
        UserError: the file is something else (named) or damaged.
    """
    path = Path(path)
    weights = find_weights(path, UNET_STEM, UNET_STEM) if path.is_dir() else path
    if weights is None:
        raise UserError(f"got the folder {path}, expected a SparseCtrl encoder: it has no {UNET_STEM} file")
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind != "sparsectrl":
        raise refusal(info, "a SparseCtrl encoder")
    official = {motion_to_official(key) if MOTION_MARK in key else key: t for key, t in file.tensors.items()}
    tensors = {key: t for key, t in official.items() if not key.endswith(POSITIONAL_ENDINGS)}
    positional = {key: t for key, t in official.items() if key not in tensors}
    config = checked_json("unet", weights.with_name("config.json"))
    with naming(path):
        metadata = sparsectrl_metadata(config) | file.metadata
    notes = [*file.notes, *(["positional encodings are computed, the file's were not loaded"] if positional else [])]
    return SparseCtrlParts(path, info.version, tensors, positional, info.positional_length, metadata, notes)


def load_sparsectrl(
    path: str | Path, unet: UNet, vae: VAE, *, norm_over_frames: bool = False
) -> tuple[SparseCtrl, LoadReport]:
    """Load a SparseCtrl encoder for an image model, in the UNet's dtype and on its device, in evaluation mode.

    Args:
        path: as of `read_sparsectrl_parts`.
        unet, vae: what it has to fit. Heads and norm groups are the UNet's where no file and no config.json says.
        norm_over_frames: let its motion modules' GroupNorm pool over frames, as diffusers runs them.

    Raises:
        UserError: the file is something else, incomplete, or made for another model.
    """
    parts = read_sparsectrl_parts(path)
    path = parts.path
    base = {"num_heads": str(unet.config.num_heads), "norm_num_groups": str(unet.config.norm_num_groups)}
    with naming(path):
        facts = base | parts.metadata
        config = sparsectrl_config(parts.tensors, facts, length=parts.length, norm_over_frames=norm_over_frames)
    check_fits(config, unet, vae, path)
    sample = next(unet.parameters())
    ready = converted(parts.tensors, sample.device, sample.dtype)
    encoder = load_strictly(blank(SparseCtrl, config), ready, "SparseCtrl encoder", path)
    report = LoadReport(path, "sparsectrl", parts.version, file_sha256(path), applied=len(ready), notes=parts.notes)
    return encoder, report


def write_sparsectrl(parts: SparseCtrlParts, path: str | Path) -> Path:
    """Write an encoder in official keys, or as diffusers' SparseControlNet folder where `path` has no suffix.

    Raises:
        UserError: SparseControlNet has no such network.
    """
    path = Path(path)
    with naming(parts.path):
        config = sparsectrl_config(parts.tensors, parts.metadata, length=parts.length)
    motion, facts = config.unet.motion, {**parts.metadata, **sparsectrl_metadata_of(config)}
    assert motion is not None
    if path.suffix:
        tensors = parts.tensors | positions_to_official(parts.positional, motion.attentions_per_block)
        return write_state_dict(path, tensors, metadata=facts, wrapper="controlnet")
    everywhere = tuple(2**level for level in range(len(config.unet.block_out_channels)))
    if (motion.resolutions, motion.attentions_per_block) != (everywhere, 1) or not motion.tells_positions:
        raise UserError(
            f"got {parts.path} with motion modules of another layout than the released ones, expected one attention "
            "with positional encoding at all resolutions: SparseControlNet has no other; keep the official format"
        )
    tensors = {motion_to_diffusers(key) if MOTION_MARK in key else key: t for key, t in parts.tensors.items()}
    tensors |= positions_to_diffusers(parts.positional)
    with model_folder(path) as folder:
        write_part(folder, tensors, sparsectrl_json(config), metadata=facts)
    return path


def sparsectrl_json(config: SparseCtrlConfig) -> Json:
    """config.json of a SparseControlNetModel."""
    unet, motion = config.unet, config.unet.motion
    assert motion is not None
    ours = ("center_input_sample", "out_channels", "sample_size", "up_block_types")
    return {key: value for key, value in unet_json(unet).items() if key not in ours} | {
        "_class_name": "SparseControlNetModel",
        "concat_conditioning_mask": True,
        "conditioning_channels": config.condition_channels,
        "conditioning_embedding_out_channels": list(config.pixel_channels) or None,
        "down_block_types": [
            "CrossAttnDownBlockMotion" if attention else "DownBlockMotion" for attention in unet.attention_levels
        ],
        "motion_max_seq_length": motion.max_frames,
        "motion_num_attention_heads": motion.num_heads,
        "temporal_transformer_layers_per_block": motion.num_transformer_blocks,
        "use_simplified_condition_embedding": not config.pixel_channels,
    }


def save_sparsectrl(
    encoder: SparseCtrl,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a SparseCtrl encoder in official keys; `load_sparsectrl` reads it back by itself.

    Args:
        path: `.safetensors`, or `.ckpt`, `.pt`, `.pth`.
        metadata: strings to add; heads, norm groups and trained length are written by themselves.
        dtype: to store the weights in, their own by default.
    """
    tensors = {key: t.to(dtype or t.dtype) for key, t in encoder.state_dict().items()}
    facts = sparsectrl_metadata_of(encoder.config)
    return write_state_dict(path, tensors, metadata={**(metadata or {}), **facts}, wrapper="controlnet")


def check_fits(config: SparseCtrlConfig, unet: UNet, vae: VAE, path: Path) -> None:
    """Compare with the model that it is to steer.

    Raises:
        UserError: a size differs, which is named.
    """
    check_encoder_fits("SparseCtrl encoder", config.unet, unet.config, path)
    if config.pixel_channels:
        name, got, expected = "pixels per latent", 2 ** (len(config.pixel_channels) - 1), vae.config.downsampling
    else:
        name, got, expected = "latent channels", config.condition_channels, vae.config.latent_channels
    if got != expected:
        raise UserError(
            f"{path}: got a SparseCtrl encoder for {got} {name}, expected the VAE's {expected}: "
            "choose a SparseCtrl encoder made for this base"
        )
