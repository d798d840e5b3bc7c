"""The image model of Shapes, the toy data set, from nothing: VAE, then text encoder and UNet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import nn

from animatediff.checkpoints.export import save_image_model
from animatediff.checkpoints.load import ImageModel
from animatediff.checkpoints.lora_files import read_lora
from animatediff.config.networks import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.config.settings import Int, Many, opt, options
from animatediff.lab.world_vae import VAE_FILE, AutoencoderStage, DecoderStage
from animatediff.models.lora import LoRAStack
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.training.diffusion_stages import DiffusionStage
from animatediff.training.distributed import first_process_first
from animatediff.training.latents import LatentClips
from animatediff.training.loop import LoopConfig, train
from animatediff.training.output_folder import damaged, read_tensors
from animatediff.training.sources import load_image_model, resolve_path
from animatediff.training.stage_config import Log, StageConfig
from animatediff.utils import UserError
from animatediff.world.series import World
from animatediff.world.styles import STYLES


@options
class ShapesImage(StageConfig):
    """VAE, then text encoder and UNet, on single frames of Shapes, the toy data set; writes image.safetensors."""

    name: ClassVar[str] = "shapes_image"

    clips: Int = opt(..., "how many clips are encoded once and drawn from", ge=1)
    vae: VAEConfig = opt(..., "sizes of the VAE,")
    unet: UNetConfig = opt(..., "of the UNet,")
    text: TextConfig = opt(..., "and of the text encoder")
    autoencoder: LoopConfig = opt(..., "the VAE's training,")
    image: LoopConfig = opt(..., "and that of the other two")
    oversampled: Many[str] = opt((), "motions to draw more often than others")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = opt("epsilon", "what the UNet predicts")
    init_from: str = opt("", "an image model to start from, of these sizes; its VAE is kept")

    def train(self, folder: Path, log: Log, device: torch.device) -> None:
        """As `StageConfig.run`. Raises: UserError where `init_from` has no VAE or other sizes than the config."""
        world = World(self.clips, oversampled=self.oversampled, seed=self.seed)
        base = load_image_model(self.init_from) if self.init_from else None
        vae = base.vae if base else self._autoencoder(folder / "vae", log, device)
        assert vae is not None
        vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
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
        trainable = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)

        def save(folder: Path, metadata: dict[str, str]) -> None:
            model = SimpleNamespace(unet=unet, vae=vae, text_encoder=text_encoder, schedule=schedule)
            facts = metadata | {"beta_schedule": schedule.beta_schedule}
            save_image_model(model, folder / "image.safetensors", metadata=facts, dtype=torch.float16)

        stage = DiffusionStage("image", unet, text_encoder, schedule, clips, trainable=trainable, save=save)
        train(stage, self.image, folder, log=log, stage_config=self)

    def _autoencoder(self, folder: Path, log: Log, device: torch.device) -> VAE:
        """The trained VAE of an earlier start, or a new one."""
        path = folder / VAE_FILE
        if not path.exists():
            torch.manual_seed(self.seed)
            stage = AutoencoderStage(self.vae, data_seed=self.seed)
            stage.modules().to(device)
            train(stage, self.autoencoder, folder, log=log, stage_config=self)
        vae = VAE(self.vae)
        remedy = "which writes it again"
        state = read_tensors(path, keys=set(vae.state_dict()), remedy=remedy)
        try:
            vae.load_state_dict(state)
        except RuntimeError as error:
            raise damaged(path, error, remedy) from None
        return vae


@options
class ShapesDecoder(StageConfig):
    """An image model of Shapes whose VAE also draws other looks: image.safetensors, and that VAE alone as
    vae.safetensors.
    """

    name: ClassVar[str] = "shapes_decoder"

    pretrained_model_path: str = opt(..., "an image model of Shapes")
    loop: LoopConfig = opt(..., "steps, batches and rates")
    styles: Many[Literal[tuple(STYLES)]] = opt(tuple(STYLES), "that it draws")
    watermarks: bool = opt(True, "stamp half of the frames")
    loras: dict[str, str] = opt({}, "by styles that it draws: LoRAs whose predictions it learns to draw, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(self.loras.keys() - (STYLES.keys() - {"plain"})):
            raise UserError(f"loras: got {unknown[0]!r}, expected styles other than plain: {', '.join(STYLES)}")

    def train(self, folder: Path, log: Log, device: torch.device) -> None:
        """As `StageConfig.run`. Raises: UserError where the model has no VAE, or a LoRA does not fit it."""
        base = load_image_model(self.pretrained_model_path)
        painters = {style: self._painter(path, log) for style, path in self.loras.items() if style in self.styles}
        stage = DecoderStage(base, painters, data_seed=self.seed, styles=self.styles, watermarks=self.watermarks)
        stage.modules().to(device)
        for model in stage.painters.values():
            model.unet.to(device)
            model.text_encoder.to(device)
        train(stage, self.loop, folder, log=log, stage_config=self)

    def _painter(self, path: str, log: Log) -> ImageModel:
        """The image model with a LoRA merged into it."""
        model = load_image_model(self.pretrained_model_path)
        loras = LoRAStack(model.unet, model.text_encoder)
        log(str(loras.add(read_lora(resolve_path(path)))))
        loras.merge()
        return model


@torch.no_grad()
def zero_unused_token_embeddings(text_encoder: TextEncoder, clips: LatentClips) -> None:
    """Tokens that no caption has get embeddings of zeros, which stay zeros, so the file compresses."""
    table = text_encoder.get_parameter("text_model.embeddings.token_embedding.weight")
    used = torch.zeros(len(table), 1)
    used[torch.cat([clips.tokens.unique(), clips.empty.unique()]).long()] = 1
    table *= used
