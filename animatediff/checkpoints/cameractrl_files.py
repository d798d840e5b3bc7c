"""CameraCtrl files: the official checkpoint of two state dicts, and the pruned file of both in one -> modules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from animatediff.checkpoints.files import PICKLE_SUFFIXES, StateDict, file_sha256, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.keymaps import POSITIONAL_ENDINGS
from animatediff.checkpoints.load import LoadReport, blank, load_strictly
from animatediff.checkpoints.mapped import converted
from animatediff.config.networks import CameraConfig
from animatediff.models.camera_network import RAY_CHANNELS, CameraCtrl, merged_attentions
from animatediff.models.unet import UNet
from animatediff.utils import UserError

WRAPPED = re.compile(r"^(pose_encoder_state_dict|attention_processor_state_dict)\.(module\.)?")
MERGE = ".processor.qkv_merge."


@dataclass(frozen=True)
class CameraParts:
    """CameraCtrl as one flat state dict, positional encodings included, which are computed and never loaded."""

    path: Path
    tensors: StateDict
    metadata: dict[str, str]
    notes: list[str]
    unused: tuple[str, ...] = ()


def read_camera_parts(path: str | Path) -> CameraParts:
    """Read CameraCtrl: the official checkpoint, or both of its state dicts in one.

    Raises:
        UserError: the file is something else.
    """
    path = Path(path)
    file = read_state_dict(path)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind != "cameractrl":
        raise refusal(info, "a CameraCtrl camera encoder")
    plain = {WRAPPED.sub("", key): t for key, t in file.tensors.items()}
    return CameraParts(path, plain, file.metadata, list(file.notes))


def write_cameractrl(parts: CameraParts, path: str | Path) -> Path:
    """Write both state dicts in one as `.safetensors`, or as the official checkpoint has them in a pickle."""
    tensors = parts.tensors
    if Path(path).suffix in PICKLE_SUFFIXES:
        groups = {key: "attention_processor" if MERGE in key else "pose_encoder" for key in tensors}
        tensors = {f"{groups[key]}_state_dict.{key}": t for key, t in tensors.items()}
    return write_state_dict(path, tensors, metadata=parts.metadata, wrapper=None)


def load_cameractrl(path: str | Path, unet: UNet) -> tuple[CameraCtrl, LoadReport]:
    """Load CameraCtrl for a video UNet, in its dtype and on its device, in evaluation mode.

    Args:
        path: as of `read_camera_parts`.
        unet: with the motion module it is to steer; CameraCtrl was trained with v3's.

    Raises:
        UserError: the file is something else, incomplete, or made for other motion modules.
    """
    parts = read_camera_parts(path)
    path = parts.path
    attentions = merged_attentions(unet)
    if not attentions:
        raise UserError(f"{path}: got CameraCtrl without a motion module, expected v3's: set motion_module")
    numbers = {f"{name}{MERGE}": f"merges.{i}." for i, name in enumerate(attentions)}
    weights = {key: t for key, t in parts.tensors.items() if not key.endswith(POSITIONAL_ENDINGS)}
    tensors = {_renamed(key, numbers): t for key, t in weights.items()}
    config = camera_config(tensors, unet)
    widths = tuple(attention.to_q.weight.shape[0] for _, attention in attentions.values())
    if config.block_out_channels != unet.config.block_out_channels or config.merge_widths != widths:
        raise UserError(
            f"{path}: got CameraCtrl of widths {config.block_out_channels} for {len(config.merge_widths)} motion "
            f"modules, expected {unet.config.block_out_channels} and {len(widths)}, the model's: "
            "choose a file made for this base and motion module"
        )
    sample = next(unet.parameters())
    ready = converted(tensors, sample.device, sample.dtype)
    camera = load_strictly(blank(CameraCtrl, config), ready, "CameraCtrl", path)
    report = LoadReport(path, "cameractrl", None, file_sha256(path), applied=len(ready), notes=parts.notes)
    return camera, report


def camera_config(tensors: StateDict, unet: UNet) -> CameraConfig:
    """Sizes of CameraCtrl in our names; its heads are the motion module's."""
    first = tensors.get("pose_encoder.encoder_conv_in.weight")
    widths = []
    while (key := f"pose_encoder.encoder_down_conv_blocks.{len(widths)}.0.block1.weight") in tensors:
        widths.append(tensors[key].shape[0])
    merges = []
    while (key := f"merges.{len(merges)}.weight") in tensors:
        merges.append(tensors[key].shape[0])
    motion = unet.config.motion
    return CameraConfig(
        block_out_channels=tuple(widths),
        merge_widths=tuple(merges),
        downsampling=8 if first is None else round((first.shape[1] / RAY_CHANNELS) ** 0.5),
        num_heads=motion.num_heads if motion else 8,
    )


def _renamed(key: str, numbers: dict[str, str]) -> str:
    for theirs, ours in numbers.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"pose_encoder.{key}" if key.startswith("encoder_") else key
