"""A pipeline's networks as files that configs can name."""

from __future__ import annotations

from pathlib import Path

from animatediff.checkpoints.export import save_image_model, save_motion_module
from animatediff.checkpoints.motion_condition_files import motion_condition_tensors
from animatediff.config.settings import dump_yaml
from animatediff.pipeline.model import Model
from animatediff.utils import UserError, replacing


def save_model(model: Model, folder: Path) -> Path:
    """Write `image_model.safetensors`, `motion_module.safetensors` and a `config.yaml` that names them.

    LoRAs are written as they are merged, at their present scales. ControlNets, IP-Adapters and other networks that are
    used as they were read are in their own files and stay there.

    Raises:
        UserError: the folder is a file, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"got {folder}, which is a file, expected a folder: choose another")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"base": folder / "image_model.safetensors"}
    save_image_model(model, files["base"])
    if model.unet.config.motion is not None:
        files["motion_module"] = folder / "motion_module.safetensors"
        picture = next((network for group, network in model.networks.items() if group in ("pia", "i2v")), None)
        condition = motion_condition_tensors(picture, model.unet) if picture else {}  # type: ignore[arg-type]
        save_motion_module(model.unet, files["motion_module"], condition=condition)
    entry = {"model": {name: str(path) for name, path in files.items()}, "prompts": {"prompt": [""]}}
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(dump_yaml([entry]), encoding="utf-8")
    return folder
