"""What `scripts/train.py` runs: a YAML names a stage, the stage builds its networks and data and calls the loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module
from animatediff.checkpoints.lora_files import read_lora
from animatediff.config import SD15_FOLDER
from animatediff.data.clips import ClipConfig, Clips
from animatediff.data.shapes import MOTIONS
from animatediff.dataclass_io import build_dataclass, parse_overrides, read_yaml
from animatediff.model_config import MOTION_VERSIONS, MotionConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.models.lora import LoRAStack
from animatediff.models.text import Tokenizer
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipelines.components import place
from animatediff.pipelines.weights import find_file
from animatediff.training.autoencoder import AutoencoderStage
from animatediff.training.contrastive import ShapesEncoder
from animatediff.training.diffusion_stages import ImageStage, MotionStage, checkpoint_activations, insert_motion
from animatediff.training.latents import ClipReader, LatentClips, StreamedClips
from animatediff.training.loop import LoopConfig, first_process_first, train
from animatediff.utils import UserError

Log = Callable[[str], None]
CPU = torch.device("cpu")
SHAPES_NOISY_SHARE = 0.5  # of clips noised beyond the middle of the schedule, where the paths of shapes are decided


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

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes `output_dir`/image.safetensors, an SD 1.x single file.

        Raises: UserError where `init_from` has no VAE or other sizes than the config.
        """
        folder = Path(self.output_dir)
        base = load_complete(self.init_from) if self.init_from else None
        vae = base.vae if base else self._autoencoder(folder / "vae", log, device)
        vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
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
        stage.modules().to(device)
        train(stage, self.image, folder, log=log)

    def _autoencoder(self, folder: Path, log: Log, device: torch.device) -> VAE:
        """The trained VAE of an earlier start, or a new one."""
        if not (folder / "vae.pt").exists():
            torch.manual_seed(self.seed)
            stage = AutoencoderStage(self.vae, data_seed=self.seed)
            stage.modules().to(device)
            train(stage, self.autoencoder, folder, log=log)
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

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes `output_dir`/motion.safetensors, an official motion module."""
        folder = Path(self.output_dir)
        base = load_complete(self.image_model)
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(self.image_model).parent / "clips.pt"  # the image stage encoded the same clips
        cache = beside if beside.exists() else folder / "clips.pt"
        vae = place(base.vae, device, torch.float32)
        clips = encode_clips(cache, vae, count=self.clips, seed=self.seed, favoured=self.favoured, log=log)
        torch.manual_seed(self.seed)
        if self.init_from:
            unet, _ = load_motion_module(base.unet, self.init_from)
        else:
            unet = insert_motion(base.unet, self.motion)
        unet, text_encoder = (place(m, device, torch.float32) for m in (unet, base.text_encoder))
        schedule = base.schedule or ScheduleConfig()
        stage = MotionStage(unet, text_encoder, schedule, clips, noisy_share=SHAPES_NOISY_SHARE)
        train(stage, self.loop, folder, log=log)


@dataclass(frozen=True)
class VideoMotion:
    """Stage `motion_module`: motion modules on video files, any image model frozen (arXiv 2307.04725, sec. 4.2)."""

    output_dir: str
    train_data: ClipConfig
    loop: LoopConfig
    pretrained_model_path: str = SD15_FOLDER  # a diffusers folder or an SD 1.x single file, with a VAE
    adapter_lora_path: str = ""  # a domain adapter that takes the videos' look upon itself; frozen too
    adapter_lora_scale: float = 1.0
    version: Literal["", "v1", "v2", "v3"] = ""  # of fresh modules, v3 by default; of `init_from` where it cannot tell
    init_from: str = ""  # a motion module to start from
    cache: bool = False  # encode one clip of each video before the start, instead of other clips in every epoch
    threads: int = 4  # that read videos
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the UNet's matrix products; weights stay float32
    gradient_checkpointing: bool = False  # a third more time for much less memory
    seed: int = 0

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes `output_dir`/motion.safetensors, an official motion module.

        Raises: UserError where a file is missing or is something else, or clips do not fit the networks.
        """
        folder = Path(self.output_dir)
        clips = Clips(self.train_data, seed=self.seed, log=log)
        base_path = existing(self.pretrained_model_path)
        base = load_complete(str(base_path))
        unet = self._video_unet(base, log)
        self._check_fit(unet, base.vae)
        folder.mkdir(parents=True, exist_ok=True)
        unet, vae, text_encoder = (place(m, device, torch.float32) for m in (unet, base.vae, base.text_encoder))
        if self.gradient_checkpointing:
            checkpoint_activations(unet)
        tokenizer_folder = base_path / "tokenizer"
        tokenizer = Tokenizer.from_folder(tokenizer_folder) if tokenizer_folder.is_dir() else Tokenizer()
        reader = ClipReader(clips, threads=self.threads)
        if self.cache:
            made_from = repr((self.train_data, self.seed, base.report.sha256, clips.videos))
            key = {"made_from": hashlib.sha256(made_from.encode()).hexdigest()}
            count = len(clips.videos)
            with first_process_first():
                source = LatentClips.build(
                    folder / "clips.pt", key, reader.batches(count), vae, tokenizer, count=count, log=log
                )
        else:
            source = StreamedClips(reader, vae, tokenizer)
        schedule = base.schedule or ScheduleConfig()
        stage = MotionStage(unet, text_encoder, schedule, source, autocast=self.dtype == "bfloat16")
        train(stage, self.loop, folder, log=log)

    def check_data(self, log: Log) -> None:
        """Look at every video and log the report.

        Raises: UserError where none can be used.
        """
        report = Clips(self.train_data, seed=self.seed, log=log).scan(threads=self.threads)
        log(str(report))
        if not report.usable:
            raise UserError(f"got {report.total} videos of which none can be used, expected some: see the report")

    def _video_unet(self, base: ImageModel, log: Log) -> UNet:
        if self.adapter_lora_path:
            loras = LoRAStack(base.unet)
            log(str(loras.add(read_lora(existing(self.adapter_lora_path)), self.adapter_lora_scale)))
            loras.merge()
        torch.manual_seed(self.seed)
        if not self.init_from:
            return insert_motion(base.unet, MOTION_VERSIONS[self.version or "v3"])
        unet, report = load_motion_module(base.unet, existing(self.init_from), version=self.version or None)
        log(str(report))
        return unet

    def _check_fit(self, unet: UNet, vae: VAE | None) -> None:
        assert unet.config.motion is not None and vae is not None
        frames, most = self.train_data.sample_n_frames, unet.config.motion.max_frames
        if frames > most:
            raise UserError(
                f"train_data: sample_n_frames: got {frames}, expected at most {most}, what the module holds"
            )
        if side := next((s for s in self.train_data.size if s % vae.config.downsampling), None):
            raise UserError(
                f"train_data: sample_size: got a side of {side} pixels, expected multiples of {vae.config.downsampling}"
            )


def existing(path: str) -> Path:
    """A file or folder, from the current folder or the repository's root.

    Raises: UserError where there is none.
    """
    if (found := find_file(path)) is None:
        raise UserError(f"got {path}, which is not there: check the path; nothing is downloaded for you")
    return found


def encode_clips(path: Path, vae: VAE, *, favoured: Sequence[str], **series: Any) -> LatentClips:
    """`LatentClips.of_shapes`, once for all processes.

    Raises: UserError where `favoured` names no motion of the world.
    """
    if unknown := set(favoured) - set(MOTIONS):
        raise UserError(f"favoured: got {min(unknown)!r}, expected motions of the world: {', '.join(MOTIONS)}")
    with first_process_first():
        return LatentClips.of_shapes(path, vae, favoured=favoured, **series)


def load_complete(path: str) -> ImageModel:
    """An image model with a VAE.

    Raises: UserError where the file has none.
    """
    model = load_base(path)
    if model.vae is None:
        raise UserError(f"got {path} without a VAE, expected a complete image model: take a file that has one")
    return model


StageConfig = ShapesImage | ShapesMotion | VideoMotion | ShapesEncoder
STAGES: dict[str, type[StageConfig]] = {
    "shapes_image": ShapesImage,
    "shapes_motion": ShapesMotion,
    "motion_module": VideoMotion,
    "shapes_encoder": ShapesEncoder,
}


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
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
