"""The image model of Shapes, the toy data set, from nothing: VAE, then text encoder and UNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from animatediff.checkpoints.export import save_image_model
from animatediff.config.networks import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.lab.world_vae import AutoencoderStage, DecoderStage
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.training.diffusion_stages import DiffusionStage
from animatediff.training.latents import LatentClips
from animatediff.training.limits import check_numbers
from animatediff.training.loop import LoopConfig, first_process_first, train
from animatediff.training.sources import load_complete
from animatediff.utils import UserError
from animatediff.world.series import World
from animatediff.world.styles import STYLES

Log = Callable[[str], None]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ShapesImage:
    """VAE, then text encoder and UNet, on single frames of Shapes."""

    name: ClassVar[str] = "shapes_image"
    output_dir: str
    clips: int  # how many clips are encoded once and drawn from
    vae: VAEConfig
    unet: UNetConfig
    text: TextConfig
    autoencoder: LoopConfig
    image: LoopConfig
    version: int = 1  # of the data set
    oversampled: tuple[str, ...] = ()  # motions to draw more often than others
    prediction_type: str = "epsilon"  # what the UNet learns to predict: epsilon, v_prediction or sample
    init_from: str = ""  # an image model to start from, of these sizes; its VAE is kept
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes `output_dir`/image.safetensors, an SD 1.x single file.

        Raises: UserError where `init_from` has no VAE or other sizes than the config.
        """
        folder, world = (
            Path(self.output_dir),
            World(self.clips, oversampled=self.oversampled, seed=self.seed, version=self.version),
        )
        base = load_complete(self.init_from) if self.init_from else None
        vae = base.vae if base else self._autoencoder(folder / "vae", log, device)
        assert vae is not None
        vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
        folder.mkdir(parents=True, exist_ok=True)
        with first_process_first():
            clips = LatentClips.of_world(folder / "clips.pt", vae, world, log=log)
        clips.single_frames = True
        torch.manual_seed(self.seed)
        unet, text_encoder = UNet(self.unet), TextEncoder(self.text)
        unet.to(memory_format=torch.channels_last)
        if base:
            if (base.unet.config, base.text_encoder.config) != (self.unet, self.text):
                raise UserError(
                    f"got {self.init_from} with {base.unet.config} and {base.text_encoder.config}, "
                    f"expected {self.unet} and {self.text}: give the file's sizes in the config"
                )
            unet.load_state_dict(base.unet.state_dict())
            text_encoder.load_state_dict(base.text_encoder.state_dict())
        else:
            zero_unused_token_embeddings(text_encoder, clips)
        schedule = ScheduleConfig(prediction_type=self.prediction_type)
        learns = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)

        def save(folder: Path, metadata: dict[str, str]) -> None:
            model = SimpleNamespace(unet=unet, vae=vae, text_encoder=text_encoder, schedule=schedule)
            facts = metadata | {"beta_schedule": schedule.beta_schedule}
            save_image_model(model, folder / "image.safetensors", metadata=facts, dtype=torch.float16)

        stage = DiffusionStage("image", unet, text_encoder, schedule, clips, learns=learns, save=save)
        train(stage, self.image, folder, log=log, stage_config=self)

    def _autoencoder(self, folder: Path, log: Log, device: torch.device) -> VAE:
        """The trained VAE of an earlier start, or a new one."""
        if not (folder / "vae.pt").exists():
            torch.manual_seed(self.seed)
            stage = AutoencoderStage(self.vae, data_seed=self.seed, version=self.version)
            stage.modules().to(device)
            train(stage, self.autoencoder, folder, log=log, stage_config=self)
        vae = VAE(self.vae)
        vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
        return vae


@dataclass(frozen=True)
class ShapesDecoder:
    """An image model of Shapes whose VAE also draws other looks."""

    name: ClassVar[str] = "shapes_decoder"
    output_dir: str
    pretrained_model_path: str
    loop: LoopConfig
    styles: tuple[str, ...] = tuple(STYLES)
    watermarks: bool = True
    version: int = 1  # of the data set
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if unknown := sorted(set(self.styles) - set(STYLES)):
            raise UserError(f"styles: got {unknown[0]!r}, expected some of {', '.join(STYLES)}")

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes `output_dir`/image.safetensors, which takes the place of the model, and its VAE alone
        as vae.safetensors.

        Raises: UserError where the model has no VAE.
        """
        base = load_complete(self.pretrained_model_path)
        stage = DecoderStage(
            base, data_seed=self.seed, version=self.version, styles=self.styles, watermarks=self.watermarks
        )
        stage.modules().to(device)
        train(stage, self.loop, Path(self.output_dir), log=log, stage_config=self)


@torch.no_grad()
def zero_unused_token_embeddings(text_encoder: TextEncoder, clips: LatentClips) -> None:
    """Tokens that no caption has get embeddings of zeros, which stay zeros, so the file compresses."""
    table = text_encoder.get_parameter("text_model.embeddings.token_embedding.weight")
    said = torch.zeros(len(table), 1)
    said[torch.cat([clips.tokens.unique(), clips.empty.unique()]).long()] = 1
    table *= said
