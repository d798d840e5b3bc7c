"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; of video models, arXiv 2402.00769).

The student jumps from any timestep to clean latents, and is trained to land where it lands from the timestep before,
to which the teacher takes one guided step of DDIM. Student and teacher are one network, with its LoRA and without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from animatediff.diffusion.samplers import LCM_SIGMA_DATA, LCM_TIMESTEP_SCALE
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.models.lora import AttachedLoRA
from animatediff.training.diffusion_stages import DiffusionStage
from animatediff.training.losses import Denoise

HUBER = 1e-3  # of the pseudo-Huber loss: squares below, absolute values above


class ConsistencyStage(DiffusionStage):
    """`trainable` is a LoRA on the network.

    Args:
        guidance: the lowest and the highest scale of the teacher's classifier-free guidance, drawn for each clip.
    """

    trainable: AttachedLoRA

    def __init__(self, *networks: Any, guidance: tuple[float, float], **options: Any):
        super().__init__(*networks, **options)
        self.guidance = guidance

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x0, tokens = self.clips.batch(index, batch_size, generator)
        device, config = next(self.unet.parameters()).device, self.schedule.config
        interval = config.num_train_timesteps // config.lcm_timesteps
        t = (torch.randint(config.lcm_timesteps, (batch_size,), generator=generator) + 1) * interval - 1
        low, high = self.guidance
        scale = low + (high - low) * torch.rand(batch_size, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x = self.schedule.add_noise(x0, noise, t).to(device)
        context = self.text_encoder(torch.cat([self.clips.empty.expand(tokens.shape).to(tokens), tokens]).to(device))
        conditional = context[batch_size:]
        scale = scale.to(device)

        def student(x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t, conditional)

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            self.trainable.scale = 0.0
            try:
                negative, positive = self.unet(x.repeat(2, 1, 1, 1, 1), t.repeat(2), context).float().chunk(2)
            finally:
                self.trainable.scale = 1.0
            return negative + scale * (positive - negative)

        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            return consistency_loss(student, teacher, self.schedule, x, t, (t - interval).clamp(min=0)), {}


def consistency_loss(
    student: Denoise, teacher: Denoise, schedule: NoiseSchedule, x: Tensor, t: Tensor, earlier: Tensor
) -> Tensor:
    """Pseudo-Huber distance of the student's clean latents from two timesteps of one path (arXiv 2310.04378, Eq. 16).

    Args:
        student, teacher: networks of the schedule's prediction type.
        schedule: of both.
        x: noisy latents (b, f, c, h, w), on the networks' device.
        t, earlier: where they are, and where the teacher takes them; timesteps (b,), on the CPU.
    """
    with torch.no_grad():
        clean, noise = schedule.clean_and_noise(teacher(x, t.to(x.device)), x, t)
        target = consistency_function(student, schedule, schedule.add_noise(clean, noise, earlier), earlier)
    difference = consistency_function(student, schedule, x, t) - target
    return ((difference.square() + HUBER**2).sqrt() - HUBER).mean()


def consistency_function(denoise: Denoise, schedule: NoiseSchedule, x: Tensor, t: Tensor) -> Tensor:
    """c_skip x + c_out x_0 of what a network makes of x at t (b,): clean latents, and x itself at t = 0 (Eq. 9)."""
    clean, _ = schedule.clean_and_noise(denoise(x, t.to(x.device)).float(), x, t)
    scaled = (t * LCM_TIMESTEP_SCALE).to(x).reshape(-1, *[1] * (x.ndim - 1))
    norm = (scaled.square() + LCM_SIGMA_DATA**2).sqrt()
    return (LCM_SIGMA_DATA / norm).square() * x + scaled / norm * clean
