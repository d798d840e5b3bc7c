"""The autoencoder of Shapes, the toy data set, on rendered frames: from nothing, or more looks for its decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.checkpoints.export import save_image_model, save_vae
from animatediff.checkpoints.load import ImageModel
from animatediff.config.networks import ScheduleConfig, VAEConfig
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.vae import VAE
from animatediff.training.loop import Stage
from animatediff.training.output_folder import write_tensors
from animatediff.world.shapes import FRAMES, SIZE, make_scene, render
from animatediff.world.styles import STYLES, stamp

VAE_FILE = "vae.pt"
PREDICTED_BELOW = 300  # timesteps from which a decoder's latents are predicted: what is left to add is detail
NOISE_LOG_VARIANCE = -6.0  # of the posterior; fixed, so that no channel can drown in its own noise


class AutoencoderStage(Stage):
    """Reconstruction in L2, L1 and image gradients, with a little noise on the latents so that they stay smooth.

    Args:
        config: of the VAE.
        data_seed: of the series of scenes.
        styles: looks that the frames have in turn.
        watermarks: stamp half of the frames.
    """

    name = "vae"

    def __init__(
        self,
        config: VAEConfig,
        *,
        data_seed: int = 0,
        styles: Sequence[str] = ("plain",),
        watermarks: bool = False,
    ):
        self.vae = VAE(config).to(memory_format=torch.channels_last)
        self.data_seed, self.styles, self.watermarks = data_seed, styles, watermarks
        with torch.no_grad():
            self.vae.quant_conv.weight[config.latent_channels :] = 0
            self.vae.quant_conv.bias[config.latent_channels :] = NOISE_LOG_VARIANCE

    def modules(self) -> nn.Module:
        return self.vae

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        first = index * batch_size
        scenes = [make_scene(first + i, seed=self.data_seed) for i in range(batch_size)]
        which = torch.randint(FRAMES, (batch_size, 1), generator=generator)
        style = torch.arange(batch_size) % len(self.styles)
        image = torch.empty(batch_size, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
        for i, name in enumerate(self.styles):
            own = [scene for scene, number in zip(scenes, style.tolist(), strict=True) if number == i]
            if own:
                image[style == i] = render(own, only_frames=which[style == i].numpy(), style=STYLES[name])[:, 0]
        stamped = (torch.arange(batch_size) // len(self.styles) % 2 == 0) & self.watermarks
        if self.watermarks:
            image[stamped] = stamp(image[stamped])
        image = image.to(self.vae.quant_conv.weight.device)
        mean, logvar = self.vae.encode(image)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        latents = mean + (0.5 * logvar.detach()).exp() * noise
        looks = ["" if mark else self.styles[i] for i, mark in zip(style.tolist(), stamped.tolist(), strict=True)]
        output = self.vae.decode(self.given(latents, [scene.caption for scene in scenes], looks, generator))
        mse = F.mse_loss(output, image)
        edges = sum(F.l1_loss(output.diff(dim=d), image.diff(dim=d)) for d in (2, 3))
        loss = 4 * mse + 0.5 * F.l1_loss(output, image) + 0.25 * edges + 1e-4 * mean.square().mean()
        return loss, {"psnr": float(10 * torch.log10(4 / mse.detach()))}

    def given(
        self, latents: Tensor, captions: Sequence[str], looks: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """What the decoder is given for these latents (n, c, h, w), unscaled; looks: their styles, "" where stamped."""
        return latents

    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write vae.pt, its latents normalised."""
        normalise_latents(self.vae, data_seed=self.data_seed)
        write_tensors(folder / VAE_FILE, self.vae.cpu().state_dict())


class DecoderStage(AutoencoderStage):
    """The decoder of an image model's VAE learns more looks, and clean edges where the UNet is not sure of them: half
    of the latents are the UNet's predictions from noisy ones, in every look that a model paints in. The encoder stays
    as it is, and with it all that was trained on its latents.

    Args:
        model: the image model, which paints in the plain look.
        painters: models made from it that paint in other looks, by these.
        data_seed, styles, watermarks: as above.
    """

    name = "decoder"

    def __init__(
        self,
        model: ImageModel,
        painters: Mapping[str, ImageModel],
        *,
        data_seed: int = 0,
        styles: Sequence[str],
        watermarks: bool,
    ):
        assert model.vae is not None
        super().__init__(model.vae.config, data_seed=data_seed, styles=styles, watermarks=watermarks)
        self.model = replace(model, vae=self.vae)
        self.painters = {"plain": model, **painters}
        self.vae.load_state_dict(model.vae.state_dict())
        self.vae.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self.vae.post_quant_conv.requires_grad_(True)
        self.schedule, self.tokenizer = NoiseSchedule(model.schedule or ScheduleConfig()), Tokenizer()

    @torch.no_grad()
    def given(
        self, latents: Tensor, captions: Sequence[str], looks: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """Half of those in a look that a model paints in as it predicts them, at a timestep below `PREDICTED_BELOW`."""
        n, scale, device = len(latents), self.vae.config.scaling_factor, latents.device
        t = torch.randint(PREDICTED_BELOW, (n,), generator=generator)
        noise = torch.randn((n, 1, *latents.shape[1:]), generator=generator).to(device)
        predicted = torch.rand(n, generator=generator) < 0.5
        x = self.schedule.add_noise(latents[:, None] * scale, noise, t)
        for look, painter in self.painters.items():
            if rows := [i for i in range(n) if predicted[i] and looks[i] == look]:
                own, at = x[rows], t[rows].to(device)
                context = painter.text_encoder(self.tokenizer([captions[i] for i in rows])[:, 0].to(device))
                clean, _ = self.schedule.clean_and_noise(painter.unet(own, at, context), own, at)
                latents = latents.index_copy(0, torch.tensor(rows, device=device), clean[:, 0] / scale)
        return latents

    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write image.safetensors, the image model with its new VAE, and vae.safetensors, that VAE alone."""
        facts = metadata | {"beta_schedule": self.schedule.config.beta_schedule}
        save_image_model(self.model, folder / "image.safetensors", metadata=facts, dtype=torch.float16)
        save_vae(self.vae, folder / "vae.safetensors", metadata=metadata, dtype=torch.float16)


@torch.no_grad()
def normalise_latents(vae: VAE, *, samples: int = 512, data_seed: int = 0) -> None:
    """Fold a shift and scale per channel into the 1x1 convolutions, so that scaled latents have mean 0, deviation 1."""
    scenes = [make_scene(i, seed=data_seed) for i in range(samples)]
    which = torch.randint(FRAMES, (samples, 1), generator=torch.Generator().manual_seed(0)).numpy()
    images = render(scenes, only_frames=which)[:, 0].contiguous(memory_format=torch.channels_last)
    device = vae.quant_conv.weight.device
    means = torch.cat([vae.encode(chunk.to(device))[0] for chunk in images.split(64)])
    shift = means.mean(dim=(0, 2, 3))
    scale = means.std(dim=(0, 2, 3)) * vae.config.scaling_factor  # new latent = (latent - shift) / scale
    c = vae.config.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:c] /= scale[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - shift) / scale
    quant.bias[c:] -= 2 * scale.log()
    post.bias += (post.weight[:, :, 0, 0] @ shift).reshape(-1)
    post.weight *= scale[None, :, None, None]
