"""The stages of the paper, on top of an image model: each builds its networks and data and calls the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import nn

from animatediff.checkpoints.export import save_image_model, save_motion_module
from animatediff.checkpoints.load import ImageModel, load_motion_module
from animatediff.checkpoints.lora_files import read_lora
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl, save_sparsectrl
from animatediff.config.networks import MOTION_VERSIONS, MotionConfig, ScheduleConfig
from animatediff.config.request import SD15_FOLDER
from animatediff.models.lora import LoRAStack
from animatediff.models.sparsectrl_encoder import SparseCtrl, build_sparsectrl
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.device import to_device
from animatediff.pipeline.model import Model
from animatediff.training.data.clips import ClipConfig
from animatediff.training.data.images import ImageConfig
from animatediff.training.diffusion_stages import (
    DiffusionStage,
    Save,
    checkpoint_activations,
    freeze,
    insert_motion,
    learn_motion,
)
from animatediff.training.limits import check_numbers
from animatediff.training.loop import LoopConfig, train
from animatediff.training.lora_stages import attach_lora
from animatediff.training.losses import MEAN_SQUARE, LossConfig
from animatediff.training.samples import SampleClips, SampleConfig
from animatediff.training.sources import Data, existing, load_complete, own_tokenizer
from animatediff.training.sparsectrl_stage import SparseCtrlStage, learn_control
from animatediff.utils import UserError
from animatediff.world.series import World

Log = Callable[[str], None]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Training(ABC):
    """What all stages on top of an image model share. A stage says in `networks` which video or image UNet it wants,
    and in `learner` which parameters of the frozen networks learn and how they are saved.
    """

    output_dir: str
    loop: LoopConfig
    pretrained_model_path: str = SD15_FOLDER  # a diffusers folder or an SD 1.x single file, with a VAE
    train_data: ClipConfig | None = None  # videos,
    image_data: ImageConfig | None = None  # or pictures,
    world: World | None = None  # or the built-in world
    loss: LossConfig = MEAN_SQUARE
    noisy_share: float = 0.0  # of clips noised beyond the middle of the schedule, where paths and places are decided
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"  # as motion modules; scaled_linear as SD 1.x itself
    samples: SampleConfig | None = None  # drawn during training
    cache: bool = False  # encode one clip of each file before the start, instead of other clips in every epoch
    threads: int = 4  # that read files
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the UNet's matrix products; weights stay float32
    gradient_checkpointing: bool = False  # a third more time for much less memory
    seed: int = 0

    name: ClassVar[str]  # `stage:` of the YAML
    stage_class: ClassVar[type[DiffusionStage]] = DiffusionStage

    def __post_init__(self) -> None:
        check_numbers(self)

    def networks(self, base: ImageModel, log: Log) -> UNet:
        """The UNet that denoises, on the CPU."""
        return base.unet

    @abstractmethod
    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        """The module whose parameters with `requires_grad` learn, all else being frozen, and how to save it."""

    def data(self) -> Data:
        return Data(self.train_data, self.image_data, self.world, single_frames=True, seed=self.seed)

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes the result into `output_dir`.

        Raises: UserError where a file is missing or is something else, or clips do not fit the networks.
        """
        folder, data, base_path = Path(self.output_dir), self.data(), existing(self.pretrained_model_path)
        if not data.world:
            data.series(log)  # mistakes in the list are told before anything is loaded
        base = load_complete(base_path)
        torch.manual_seed(self.seed)
        unet = self.networks(base, log)
        self.check_fit(data, unet, base)
        base = replace(
            base,
            unet=to_device(unet, device, torch.float32),
            vae=to_device(base.vae, device, torch.float32),
            text_encoder=to_device(base.text_encoder, device, torch.float32),
            schedule=replace(base.schedule or ScheduleConfig(), beta_schedule=self.beta_schedule),
        )
        freeze(base.unet, base.vae, base.text_encoder)
        learns, save = self.learner(base.unet, base)
        sampler = self._sampler(base, base_path, learns, log)
        if self.gradient_checkpointing:
            checkpoint_activations(base.unet)
            if isinstance(learns, SparseCtrl):
                checkpoint_activations(learns)
        folder.mkdir(parents=True, exist_ok=True)
        clips = data.source(base, base_path, folder, cache=self.cache, threads=self.threads, log=log)
        stage = self.stage_class(
            self.name,
            base.unet,
            base.text_encoder,
            base.schedule,
            clips,
            learns=learns,
            save=save,
            loss=self.loss,
            noisy_share=self.noisy_share,
            autocast=None if self.dtype == "float32" else getattr(torch, self.dtype),
        )
        train(stage, self.loop, folder, log=log, sampler=sampler, stage_config=self)

    def check_data(self, log: Log) -> None:
        """Look at every file and log the report. Raises: UserError where none can be used."""
        self.data().check(log)

    def check_fit(self, data: Data, unet: UNet, base: ImageModel) -> None:
        """Raises: UserError where the clips are none for these networks."""
        assert base.vae is not None
        data.check_fit(base.vae)

    def _sampler(self, base: ImageModel, base_path: Path, learns: nn.Module, log: Log) -> SampleClips | None:
        if self.samples is None:
            return None
        parts = Model(
            unet=base.unet,
            vae=base.vae,
            text_encoder=base.text_encoder,
            tokenizer=own_tokenizer(base_path),
            schedule=base.schedule,
            loras=LoRAStack(base.unet, base.text_encoder),
            networks={"sparsectrl": learns} if isinstance(learns, SparseCtrl) else {},
        )
        return SampleClips(self.samples, parts, log)


@dataclass(frozen=True, kw_only=True)
class ImageFinetune(Training):
    """A personalised model from pictures, every weight of the UNet (as DreamBooth does)."""

    name = "image_finetune"
    train_text_encoder: bool = False

    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        learns = nn.ModuleDict({"unet": unet})
        if self.train_text_encoder:
            learns["text_encoder"] = base.text_encoder
        learns.requires_grad_(True)

        def save(folder: Path, metadata: dict[str, str]) -> None:
            model = SimpleNamespace(unet=unet, vae=base.vae, text_encoder=base.text_encoder, schedule=base.schedule)
            facts = metadata | {"beta_schedule": self.beta_schedule}
            save_image_model(model, folder / "image.safetensors", metadata=facts, dtype=torch.float16)

        return learns, save


@dataclass(frozen=True, kw_only=True)
class ImageLoRA(Training):
    """The same as a small file in kohya's grammar, `lora_model_path` of a prompt config."""

    name = "image_lora"
    rank: int = 16
    alpha: float | None = None  # the change is multiplied by alpha / rank; rank by default
    train_text_encoder: bool = False
    convolutions: bool = False  # change these too, not the transformers alone: for looks that are texture

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha: got {self.alpha:g}, expected above 0: at 0 nothing can be learnt")

    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        text_encoder: TextEncoder | None = base.text_encoder if self.train_text_encoder else None
        lora = attach_lora("lora", unet, text_encoder, rank=self.rank, alpha=self.alpha, convolutions=self.convolutions)
        return lora.attached, lambda folder, metadata: lora.save(folder / "lora.safetensors", metadata)


@dataclass(frozen=True, kw_only=True)
class DomainAdapter(Training):
    """Takes the look of a video set upon itself, from single frames (sec. 4.1)."""

    name = "domain_adapter"
    rank: int = 128

    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        lora = attach_lora("domain-adapter", unet, rank=self.rank)
        return lora.attached, lambda folder, metadata: lora.save(folder / "adapter.safetensors", metadata)


@dataclass(frozen=True, kw_only=True)
class ClipTraining(Training):
    """What stages on clips share: motion modules take part, and perhaps a domain adapter, active and frozen."""

    adapter_lora_path: str = ""  # takes the videos' look upon itself
    adapter_lora_scale: float = 1.0
    version: Literal["", "v1", "v2", "v3"] = ""  # of the motion module, where its file cannot tell

    def data(self) -> Data:
        return Data(self.train_data, self.image_data, self.world, single_frames=False, seed=self.seed)

    def check_fit(self, data: Data, unet: UNet, base: ImageModel) -> None:
        super().check_fit(data, unet, base)
        assert unet.config.motion is not None
        most = unet.config.motion.max_frames
        if data.videos and (frames := data.videos.sample_n_frames) > most:
            raise UserError(
                f"train_data: sample_n_frames: got {frames}, expected at most {most}, what the module holds"
            )

    def adapted(self, unet: UNet, log: Log) -> UNet:
        if self.adapter_lora_path:
            loras = LoRAStack(unet)
            log(str(loras.add(read_lora(existing(self.adapter_lora_path)), self.adapter_lora_scale)))
            loras.merge()
        return unet

    def with_module(self, unet: UNet, path: str, log: Log) -> UNet:
        unet, report = load_motion_module(unet, existing(path), version=self.version or None)
        log(str(report))
        return unet


@dataclass(frozen=True, kw_only=True)
class MotionModule(ClipTraining):
    """Motion modules on clips, any image model frozen around them (sec. 4.2)."""

    name = "motion_module"
    init_from: str = ""  # a motion module to start from, in place of a fresh one of `version`, v3 by default,
    motion: MotionConfig | None = None  # or of these sizes
    zero_init: bool = True  # of fresh ones, which then change nothing at first

    def networks(self, base: ImageModel, log: Log) -> UNet:
        unet = self.adapted(base.unet, log)
        if self.init_from:
            return self.with_module(unet, self.init_from, log)
        torch.manual_seed(self.seed)
        motion = self.motion or MOTION_VERSIONS[self.version or "v3"]
        return insert_motion(unet, motion, zero_init=self.zero_init)

    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        def save(folder: Path, metadata: dict[str, str]) -> None:
            save_motion_module(unet, folder / "motion.safetensors", metadata=metadata, dtype=torch.float16)

        return learn_motion(unet), save


@dataclass(frozen=True, kw_only=True)
class MotionLoRA(ClipTraining):
    """A new motion from few clips, image model and motion module frozen (sec. 4.3)."""

    name = "motion_lora"
    motion_module: str
    rank: int = 64

    def networks(self, base: ImageModel, log: Log) -> UNet:
        return self.with_module(self.adapted(base.unet, log), self.motion_module, log)

    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        lora = attach_lora("motion-lora", unet, rank=self.rank)
        return lora.attached, lambda folder, metadata: lora.save(folder / "motion_lora.safetensors", metadata)


@dataclass(frozen=True, kw_only=True)
class SparseCtrlTraining(ClipTraining):
    """An encoder of given frames, image model and motion module frozen (arXiv 2311.16933)."""

    name = "sparsectrl"
    motion_module: str
    kind: Literal["rgb", "scribble"]
    init_from: str = ""  # an encoder to start from, in place of a fresh one

    stage_class = SparseCtrlStage

    def data(self) -> Data:
        return replace(super().data(), scribbles=self.kind == "scribble")

    def networks(self, base: ImageModel, log: Log) -> UNet:
        return self.with_module(self.adapted(base.unet, log), self.motion_module, log)

    def learner(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        encoder = to_device(self.encoder(unet, base.vae), unet.conv_in.weight.device, torch.float32)
        most = encoder.config.unet.motion.max_frames
        if self.train_data and (frames := self.train_data.sample_n_frames) > most:
            raise UserError(
                f"train_data: sample_n_frames: got {frames}, expected at most {most}, what the encoder holds"
            )

        def save(folder: Path, metadata: dict[str, str]) -> None:
            save_sparsectrl(encoder, folder / "sparsectrl.safetensors", metadata=metadata, dtype=torch.float16)

        return learn_control(encoder), save

    def encoder(self, unet: UNet, vae: VAE) -> SparseCtrl:
        """Raises: UserError where the file is no encoder of this kind for these networks."""
        if self.init_from:
            encoder, _ = load_sparsectrl(existing(self.init_from), unet, vae)
            if encoder.config.kind != self.kind:
                raise UserError(f"init_from: got an encoder of kind {encoder.config.kind}, expected {self.kind}")
            return encoder
        sizes = vae.config
        return build_sparsectrl(unet, self.kind, downsampling=sizes.downsampling, latent_channels=sizes.latent_channels)
