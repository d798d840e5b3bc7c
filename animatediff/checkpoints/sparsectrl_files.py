"""SparseCtrl encoders: official files, diffusers' SparseControlNet files and folders, and our own <-> modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from animatediff.checkpoints.controlnet_files import check_encoder_fits
from animatediff.checkpoints.diffusers_json import UNET_STEM, optional_json, sparsectrl_metadata
from animatediff.checkpoints.files import file_sha256, find_weights, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.keymaps import MOTION_MARK, POSITIONAL_ENDINGS, motion_to_official
from animatediff.checkpoints.load import LoadReport, load_strictly
from animatediff.checkpoints.mapped import converted
from animatediff.checkpoints.sizes import sparsectrl_config, sparsectrl_metadata_of
from animatediff.config.networks import SparseCtrlConfig
from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError, naming


def load_sparsectrl(
    path: str | Path, unet: UNet, vae: VAE, *, norm_over_frames: bool = False
) -> tuple[SparseCtrl, LoadReport]:
    """Load a SparseCtrl encoder for an image model, in the UNet's dtype and on its device, in evaluation mode.

    Args:
        path: an official file or one of diffusers' SparseControlNet (file or folder).
        unet, vae: what it has to fit. Heads and norm groups are the UNet's where no file and no config.json says.
        norm_over_frames: let its motion modules' GroupNorm pool over frames, as diffusers runs them.

    Raises:
        UserError: the file is something else, incomplete, or made for another model.
    """
    path = Path(path)
    weights = find_weights(path, UNET_STEM, UNET_STEM) if path.is_dir() else path
    if weights is None:
        raise UserError(f"got the folder {path}, expected a SparseCtrl encoder: it has no {UNET_STEM} file")
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind != "sparsectrl":
        raise refusal(info, "a SparseCtrl encoder")
    tensors = {
        motion_to_official(key) if MOTION_MARK in key else key: t
        for key, t in file.tensors.items()
        if not key.endswith(POSITIONAL_ENDINGS)
    }
    base = {"num_heads": str(unet.config.num_heads), "norm_num_groups": str(unet.config.norm_num_groups)}
    with naming(path):
        facts = base | sparsectrl_metadata(optional_json(weights.with_name("config.json"))) | file.metadata
        length = info.positional_length
        config = sparsectrl_config(tensors, facts, length=length, norm_over_frames=norm_over_frames)
    check_fits(config, unet, vae, path)
    sample = next(unet.parameters())
    ready = converted(tensors, sample.device, sample.dtype)
    encoder = load_strictly(lambda: SparseCtrl(config), ready, "SparseCtrl encoder", path)
    notes = list(file.notes)
    if len(tensors) < len(file.tensors):
        notes.append("positional encodings are computed, the file's were not loaded")
    report = LoadReport(path, info.kind, info.version, file_sha256(path), applied=len(ready), notes=notes)
    return encoder, report


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
