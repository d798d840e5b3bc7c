"""The stages of the paper, on top of an image model: each builds its networks and data and calls the loop."""

from __future__ import annotations

import json
from abc import abstractmethod
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from animatediff.checkpoints.export import save_image_model, save_motion_module
from animatediff.checkpoints.load import ImageModel, load_motion_module
from animatediff.checkpoints.lora_files import read_lora
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl, save_sparsectrl
from animatediff.config.networks import (
    MOTION_VERSIONS,
    Distillation,
    MotionConfig,
    ScheduleConfig,
    consistency,
    distilled_schedule,
)
from animatediff.config.request import SD15_FOLDER
from animatediff.config.settings import Float, Int, Many, limits, opt, options
from animatediff.models.lora import LoRAStack
from animatediff.models.sparsectrl_encoder import SparseCtrl, build_sparsectrl
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.device import to_device
from animatediff.pipeline.model import Model
from animatediff.training.consistency import ConsistencyStage
from animatediff.training.data.clips import ClipConfig
from animatediff.training.data.images import ImageConfig
from animatediff.training.diffusion_stages import (
    DiffusionStage,
    Save,
    checkpoint_activations,
    freeze,
    insert_motion,
    unfreeze_motion_modules,
)
from animatediff.training.latents import SCRIBBLES
from animatediff.training.loop import LoopConfig, train
from animatediff.training.lora_stages import Algorithm, attach_lora
from animatediff.training.losses import MAX_FACTOR, MEAN_SQUARE, LossConfig
from animatediff.training.samples import SampleClips, SampleConfig
from animatediff.training.sources import Data, load_image_model, load_tokenizer, resolve_path
from animatediff.training.sparsectrl_stage import SparseCtrlStage, unfreeze_sparsectrl
from animatediff.training.stage_config import Log, StageConfig
from animatediff.utils import UserError
from animatediff.world.series import World


@options
class Training(StageConfig):
    """What all stages on top of an image model share. A stage says in `networks` which video or image UNet it wants,
    and in `trainable` which parameters of the frozen networks are trained and how they are saved.
    """

    stage_class: ClassVar[type[DiffusionStage]] = DiffusionStage

    loop: LoopConfig = opt(..., "steps, batches and rates")
    pretrained_model_path: str = opt(SD15_FOLDER, "a diffusers folder or an SD 1.x single file, with a VAE")
    train_data: ClipConfig | None = opt(None, "videos to train on,")
    image_data: ImageConfig | None = opt(None, "or pictures,")
    world: World | None = opt(None, "or Shapes, the toy data set")
    loss: LossConfig = opt(MEAN_SQUARE, "variants of the loss")
    high_noise_fraction: Float = opt(
        0.0, "of clips noised beyond the middle of the schedule, where paths are decided", "noisy_share", ge=0, le=1
    )
    beta_schedule: Literal["linear", "scaled_linear"] = opt(
        "linear", "of the noise: as motion modules, or scaled_linear as SD 1.x itself"
    )
    samples: SampleConfig | None = opt(None, "clips drawn during training")
    cache: bool = opt(False, "encode one clip of each file before the start, instead of others in every epoch")
    num_workers: Int = opt(4, "processes that read files; 0: none beside the training", "threads", ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] = opt(
        "float32", "of the UNet's matrix products; weights stay float32"
    )
    gradient_checkpointing: bool = opt(False, "a third more time for much less memory")

    def networks(self, base: ImageModel, log: Log) -> UNet:
        """The UNet that denoises, on the CPU."""
        return base.unet

    @abstractmethod
    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        """The module whose parameters with `requires_grad` are trained, all else being frozen, and how to save it."""

    def stage_options(self) -> dict[str, Any]:
        """What `stage_class` takes beside what all take."""
        return {}

    def data(self) -> Data:
        return Data(self.train_data, self.image_data, self.world, single_frames=True, seed=self.seed)

    def train(self, folder: Path, log: Log, device: torch.device) -> None:
        """As `StageConfig.run`."""
        data, base_path = self.data(), resolve_path(self.pretrained_model_path)
        if not data.world:
            data.series()  # mistakes in the list are told before anything is loaded
        base = load_image_model(base_path)
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
        trainable, save = self.trainable(base.unet, base)
        sampler = self._sampler(base, base_path, trainable, log)
        if self.gradient_checkpointing:
            checkpoint_activations(base.unet)
            if trainable is not base.unet:
                checkpoint_activations(trainable)
        clips = data.source(base, base_path, folder, cache=self.cache, num_workers=self.num_workers, log=log)
        stage = self.stage_class(
            self.name,
            base.unet,
            base.text_encoder,
            base.schedule,
            clips,
            trainable=trainable,
            save=save,
            loss=self.loss,
            high_noise_fraction=self.high_noise_fraction,
            autocast=None if self.dtype == "float32" else getattr(torch, self.dtype),
            **self.stage_options(),
        )
        with closing(clips):
            train(stage, self.loop, folder, log=log, sampler=sampler, stage_config=self)

    def check_data(self, log: Log) -> None:
        """Look at every file and log the report. Raises: UserError where none can be used."""
        self.data().check(log)

    def check_fit(self, data: Data, unet: UNet, base: ImageModel) -> None:
        """Raises: UserError where the clips are none for these networks."""
        assert base.vae is not None
        data.check_fit(base.vae)

    def sample_networks(self, trainable: nn.Module) -> dict[str, nn.Module]:
        """`Model.networks` of the clips drawn during training."""
        return {}

    def sample_distillation(self) -> Distillation | None:
        """How these clips have to be sampled, where not as usual."""
        return None

    def _sampler(self, base: ImageModel, base_path: Path, trainable: nn.Module, log: Log) -> SampleClips | None:
        if self.samples is None:
            return None
        parts = Model(
            unet=base.unet,
            vae=base.vae,
            text_encoder=base.text_encoder,
            tokenizer=load_tokenizer(base_path),
            schedule=distilled_schedule(base.schedule, distillation := self.sample_distillation()),
            loras=LoRAStack(base.unet, base.text_encoder),
            networks=self.sample_networks(trainable),
            distillation=distillation,
        )
        return SampleClips(self.samples, parts, log)


@options
class ImageFinetune(Training):
    """A personalised model from pictures, every weight of the UNet (as DreamBooth does)."""

    name: ClassVar[str] = "image_finetune"
    train_text_encoder: bool = opt(False, "train the text encoder too")

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        trainable = nn.ModuleDict({"unet": unet})
        if self.train_text_encoder:
            trainable["text_encoder"] = base.text_encoder
        trainable.requires_grad_(True)

        def save(folder: Path, metadata: dict[str, str]) -> None:
            model = SimpleNamespace(unet=unet, vae=base.vae, text_encoder=base.text_encoder, schedule=base.schedule)
            facts = metadata | {"beta_schedule": self.beta_schedule}
            save_image_model(model, folder / "image.safetensors", metadata=facts, dtype=torch.float16)

        return trainable, save


@options
class ImageLoRA(Training):
    """A personalised model as a LoRA: a small file in kohya's grammar, `lora_model_path` of a prompt config."""

    name: ClassVar[str] = "image_lora"
    rank: Int = opt(16, "of every change", ge=1)
    alpha: Float | None = opt(None, "the change is multiplied by alpha / rank; rank by default", gt=0, le=MAX_FACTOR)
    train_text_encoder: bool = opt(False, "train the text encoder too")
    algorithm: Algorithm = opt("lora", "what a change is made of; locon: lora with convolutions")
    convolutions: bool = opt(False, "change these too, not the transformers alone: for looks that are texture")
    init_from: str = opt("", "a LoRA to start from, in place of a fresh one")

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        text_encoder: TextEncoder | None = base.text_encoder if self.train_text_encoder else None
        lora = attach_lora(
            "lora",
            unet,
            text_encoder,
            rank=self.rank,
            alpha=self.alpha,
            convolutions=self.convolutions,
            algorithm=self.algorithm,
            init_from=self.init_from,
        )
        return lora.attached, lambda folder, metadata: lora.save(folder / "lora.safetensors", metadata)


@options
class DomainAdapter(Training):
    """Takes the look of a video set upon itself, from single frames (sec. 4.1)."""

    name: ClassVar[str] = "domain_adapter"
    rank: Int = opt(128, "of every change", ge=1)
    init_from: str = opt("", "a LoRA to start from, in place of a fresh one")

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        lora = attach_lora("domain-adapter", unet, rank=self.rank, init_from=self.init_from)
        return lora.attached, lambda folder, metadata: lora.save(folder / "adapter.safetensors", metadata)


@options
class ClipTraining(Training):
    """What stages on clips share: motion modules take part, and perhaps a domain adapter, active and frozen."""

    adapter_lora_path: str = opt("", "a domain adapter, which takes the videos' look upon itself")
    adapter_lora_scale: Float = opt(1.0, "its strength", ge=-MAX_FACTOR, le=MAX_FACTOR)
    version: Literal["", "v1", "v2", "v3"] = opt("", "of the motion module, where its file cannot tell")

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
            log(str(loras.add(read_lora(resolve_path(self.adapter_lora_path)), self.adapter_lora_scale)))
            loras.merge()
        return unet

    def with_module(self, unet: UNet, path: str, log: Log) -> UNet:
        unet, report = load_motion_module(unet, resolve_path(path), version=self.version or None)
        log(str(report))
        return unet


@options
class MotionModule(ClipTraining):
    """Motion modules on clips, any image model frozen around them (sec. 4.2)."""

    name: ClassVar[str] = "motion_module"
    init_from: str = opt("", "a motion module to start from, in place of a fresh one of `version`, v3 by default,")
    motion: MotionConfig | None = opt(None, "or of these sizes")
    zero_init: bool = opt(True, "of fresh ones, which then change nothing at first")

    def networks(self, base: ImageModel, log: Log) -> UNet:
        unet = self.adapted(base.unet, log)
        if self.init_from:
            return self.with_module(unet, self.init_from, log)
        torch.manual_seed(self.seed)
        motion = self.motion or MOTION_VERSIONS[self.version or "v3"]
        return insert_motion(unet, motion, zero_init=self.zero_init)

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        def save(folder: Path, metadata: dict[str, str]) -> None:
            save_motion_module(unet, folder / "motion.safetensors", metadata=metadata, dtype=torch.float16)

        return unfreeze_motion_modules(unet), save


@options
class MotionLoRA(ClipTraining):
    """A new motion from few clips, image model and motion module frozen (sec. 4.3)."""

    name: ClassVar[str] = "motion_lora"
    motion_module: str = opt(..., "the module that it changes")
    rank: Int = opt(64, "of every change", ge=1)
    algorithm: Algorithm = opt("lora", "what a change is made of")
    init_from: str = opt("", "a LoRA to start from, in place of a fresh one")

    def networks(self, base: ImageModel, log: Log) -> UNet:
        return self.with_module(self.adapted(base.unet, log), self.motion_module, log)

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        lora = attach_lora("motion-lora", unet, rank=self.rank, algorithm=self.algorithm, init_from=self.init_from)
        return lora.attached, lambda folder, metadata: lora.save(folder / "motion_lora.safetensors", metadata)


@options
class ConsistencyTraining(ClipTraining):
    """A LoRA on image model and motion module for a few steps: of the sampler lcm (arXiv 2310.04378), or of ddim."""

    name: ClassVar[str] = "consistency"
    stage_class: ClassVar[type[DiffusionStage]] = ConsistencyStage
    motion_module: str = opt(..., "the module that moves the clips")
    rank: Int = opt(64, "of every change", ge=1)
    guidance_range: Many[Annotated[Float, limits(ge=0, le=MAX_FACTOR)]] = opt(
        (5.0, 9.0), "lowest and highest scale of guidance that is distilled into it", min_length=2, max_length=2
    )
    timesteps: Int = opt(100, "from noise to clean between which the teacher steps; a divisor of 1000", ge=1)
    phases: Int = opt(1, "1: for the sampler lcm; else for as many steps of ddim, spaced `trailing`", ge=1)
    init_from: str = opt("", "a LoRA to start from, in place of a fresh one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1000 % self.timesteps or self.timesteps % self.phases:
            raise UserError(
                f"got timesteps {self.timesteps} and phases {self.phases}, expected a divisor of 1000 and one of that: "
                "100 and 1, or 20 and 4"
            )
        for name, unused in (("loss", MEAN_SQUARE), ("high_noise_fraction", 0.0)):
            if getattr(self, name) != unused:
                raise UserError(f"got {name}, which the stage consistency has no use for: remove it")

    def networks(self, base: ImageModel, log: Log) -> UNet:
        return self.with_module(self.adapted(base.unet, log), self.motion_module, log)

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        lora = attach_lora("consistency", unet, rank=self.rank, init_from=self.init_from)
        facts = {"consistency": json.dumps({"timesteps": self.timesteps, "phases": self.phases})}

        def save(folder: Path, metadata: dict[str, str]) -> None:
            lora.save(folder / "consistency_lora.safetensors", metadata | facts)

        return lora.attached, save

    def stage_options(self) -> dict[str, Any]:
        return {"guidance": self.guidance_range, "timesteps": self.timesteps, "phases": self.phases}

    def sample_distillation(self) -> Distillation:
        return consistency(self.timesteps, self.phases)


@options
class SparseCtrlTraining(ClipTraining):
    """An encoder of given frames, image model and motion module frozen (arXiv 2311.16933)."""

    name: ClassVar[str] = "sparsectrl"
    motion_module: str = opt(..., "the module that moves the clips")
    kind: Literal["rgb", "scribble"] = opt(..., "given frames as they are, or as drawings")
    init_from: str = opt("", "an encoder to start from, in place of a fresh one")

    stage_class: ClassVar[type[DiffusionStage]] = SparseCtrlStage

    def data(self) -> Data:
        return replace(super().data(), condition=SCRIBBLES if self.kind == "scribble" else None)

    def networks(self, base: ImageModel, log: Log) -> UNet:
        return self.with_module(self.adapted(base.unet, log), self.motion_module, log)

    def trainable(self, unet: UNet, base: ImageModel) -> tuple[nn.Module, Save]:
        encoder = to_device(self.encoder(unet, base.vae), unet.conv_in.weight.device, torch.float32)
        most = encoder.config.unet.motion.max_frames
        if self.train_data and (frames := self.train_data.sample_n_frames) > most:
            raise UserError(
                f"train_data: sample_n_frames: got {frames}, expected at most {most}, what the encoder holds"
            )

        def save(folder: Path, metadata: dict[str, str]) -> None:
            save_sparsectrl(encoder, folder / "sparsectrl.safetensors", metadata=metadata, dtype=torch.float16)

        return unfreeze_sparsectrl(encoder), save

    def sample_networks(self, trainable: nn.Module) -> dict[str, nn.Module]:
        return {"sparsectrl": trainable}

    def encoder(self, unet: UNet, vae: VAE) -> SparseCtrl:
        """Raises: UserError where the file is no encoder of this kind for these networks."""
        if self.init_from:
            encoder, _ = load_sparsectrl(resolve_path(self.init_from), unet, vae)
            if encoder.config.kind != self.kind:
                raise UserError(f"init_from: got an encoder of kind {encoder.config.kind}, expected {self.kind}")
            return encoder
        sizes = vae.config
        return build_sparsectrl(unet, self.kind, downsampling=sizes.downsampling, latent_channels=sizes.latent_channels)
