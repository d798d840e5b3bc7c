"""What `scripts/train.py` runs: a YAML names a stage, the stage builds its networks and data and calls the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module
from animatediff.data.shapes import MOTIONS
from animatediff.dataclass_io import build_dataclass, parse_overrides, read_yaml
from animatediff.model_config import MotionConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.models.vae import VAE
from animatediff.training.autoencoder import AutoencoderStage
from animatediff.training.diffusion_stages import ImageStage, MotionStage, insert_motion
from animatediff.training.latents import LatentClips
from animatediff.training.loop import LoopConfig, first_process_first, train
from animatediff.utils import UserError

Log = Callable[[str], None]


@dataclass(frozen=True)
class ShapesImage:
    """Stage `shapes_image`: VAE, then text encoder and UNet, on single frames of the built-in world."""

    output_dir: str
    clips: int  # how many clips are encoded once and drawn from
    vae: VAEConfig
    unet: UNetConfig
    text: TextConfig
    autoencoder: LoopConfig
    image: LoopConfig
    favoured: tuple[str, ...] = ()  # motions to draw more often than others
    prediction_type: str = "epsilon"  # what the UNet learns to predict: epsilon, v_prediction or sample
    init_from: str = ""  # an image model to start from, of these sizes; its VAE is kept
    seed: int = 0

    def run(self, log: Log) -> None:
        """Train, or go on; writes `output_dir`/image.safetensors, an SD 1.x single file.

        Raises: UserError where `init_from` has no VAE or other sizes than the config.
        """
        folder = Path(self.output_dir)
        base = load_complete(self.init_from) if self.init_from else None
        vae = base.vae if base else self._autoencoder(folder / "vae", log)
        vae.to(memory_format=torch.channels_last).requires_grad_(False)
        folder.mkdir(parents=True, exist_ok=True)
        clips = encode_clips(
            folder / "clips.pt", vae, count=self.clips, seed=self.seed, favoured=self.favoured, log=log
        )
        torch.manual_seed(self.seed)
        schedule = ScheduleConfig(prediction_type=self.prediction_type)
        stage = ImageStage(self.unet, self.text, schedule, vae, clips)
        if base:
            if (base.unet.config, base.text_encoder.config) != (self.unet, self.text):
                raise UserError(
                    f"got {self.init_from} with {base.unet.config} and {base.text_encoder.config}, "
                    f"expected {self.unet} and {self.text}: give the file's sizes in the config"
                )
            stage.unet.load_state_dict(base.unet.state_dict())
            stage.text_encoder.load_state_dict(base.text_encoder.state_dict())
        train(stage, self.image, folder, log=log)

    def _autoencoder(self, folder: Path, log: Log) -> VAE:
        """The trained VAE of an earlier start, or a new one."""
        if not (folder / "vae.pt").exists():
            torch.manual_seed(self.seed)
            train(AutoencoderStage(self.vae, data_seed=self.seed), self.autoencoder, folder, log=log)
        vae = VAE(self.vae)
        vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
        return vae


@dataclass(frozen=True)
class ShapesMotion:
    """Stage `shapes_motion`: motion modules on clips of the built-in world, the image model frozen."""

    output_dir: str
    image_model: str
    clips: int
    motion: MotionConfig
    loop: LoopConfig
    favoured: tuple[str, ...] = ()  # motions to draw more often than others
    init_from: str = ""  # a motion module to start from; its own sizes count, not `motion`
    seed: int = 0

    def run(self, log: Log) -> None:
        """Train, or go on; writes `output_dir`/motion.safetensors, an official motion module."""
        folder = Path(self.output_dir)
        base = load_complete(self.image_model)
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(self.image_model).parent / "clips.pt"  # the image stage encoded the same clips
        cache = beside if beside.exists() else folder / "clips.pt"
        clips = encode_clips(cache, base.vae, count=self.clips, seed=self.seed, favoured=self.favoured, log=log)
        torch.manual_seed(self.seed)
        if self.init_from:
            unet, _ = load_motion_module(base.unet, self.init_from)
        else:
            unet = insert_motion(base.unet, self.motion)
        schedule = base.schedule or ScheduleConfig()
        train(MotionStage(unet, base.text_encoder, schedule, clips), self.loop, folder, log=log)


def encode_clips(path: Path, vae: VAE, *, favoured: Sequence[str], **series: Any) -> LatentClips:
    """`LatentClips.build`, once for all processes.

    Raises: UserError where `favoured` names no motion of the world.
    """
    if unknown := set(favoured) - set(MOTIONS):
        raise UserError(f"favoured: got {min(unknown)!r}, expected motions of the world: {', '.join(MOTIONS)}")
    with first_process_first():
        return LatentClips.build(path, vae, favoured=favoured, **series)


def load_complete(path: str) -> ImageModel:
    """An image model with a VAE.

    Raises: UserError where the file has none.
    """
    model = load_base(path)
    if model.vae is None:
        raise UserError(f"got {path} without a VAE, expected a complete image model: take a file that has one")
    return model


STAGES: dict[str, type[ShapesImage] | type[ShapesMotion]] = {
    "shapes_image": ShapesImage,
    "shapes_motion": ShapesMotion,
}


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> ShapesImage | ShapesMotion:
    """Read a training YAML; `overrides` are `key=value` texts for its top-level keys.

    Raises: UserError for an unknown stage or key, a missing or mistyped value.
    """
    raw: Any = read_yaml(Path(path))
    if not isinstance(raw, Mapping) or raw.get("stage") not in STAGES:
        got = raw.get("stage") if isinstance(raw, Mapping) else raw
        raise UserError(f"{path}: got stage {got!r}, expected one of {', '.join(STAGES)}")
    cls = STAGES[raw["stage"]]
    values = {key: value for key, value in raw.items() if key != "stage"} | parse_overrides(cls, overrides)
    return build_dataclass(cls, values, where=str(path))
