"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; of video models, arXiv 2402.00769), in phases.

The noise levels are cut into phases (Wang et al. 2024, arXiv 2405.18407; one: latent consistency). The student jumps
from any timestep to the end of its phase, and is trained to land where it lands from the timestep before, to which the
teacher takes one guided step of DDIM. Student and teacher are one network, with its LoRA and without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.models.lora import AttachedLoRA
from animatediff.training.diffusion_stages import DiffusionStage
from animatediff.training.losses import Denoise

HUBER = 1e-3  # of the pseudo-Huber loss: squares below, absolute values above


class ConsistencyStage(DiffusionStage):
    """`trainable` is a LoRA on the network.

    Args:
        guidance: the lowest and the highest scale of the teacher's classifier-free guidance, drawn for each clip.
        timesteps: between which the teacher steps; a divisor of the schedule's.
        phases: a divisor of `timesteps`.
    """

    trainable: AttachedLoRA

    def __init__(self, *networks: Any, guidance: tuple[float, float], timesteps: int, phases: int, **options: Any):
        super().__init__(*networks, **options)
        self.guidance, self.timesteps, self.phases = guidance, timesteps, phases

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x0, tokens = self.clips.batch(index, batch_size, generator)
        device = next(self.unet.parameters()).device
        interval, each = self.schedule.config.num_train_timesteps // self.timesteps, self.timesteps // self.phases
        number = torch.randint(self.timesteps, (batch_size,), generator=generator)
        t, earlier, end = ((n * interval - 1) for n in (number + 1, number, number // each * each))
        low, high = self.guidance
        scale = low + (high - low) * torch.rand(batch_size, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        x = self.schedule.add_noise(x0.to(device), noise, t)
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
            return consistency_loss(student, teacher, self.schedule, x, t, earlier, end), {}


def consistency_loss(
    student: Denoise, teacher: Denoise, schedule: NoiseSchedule, x: Tensor, t: Tensor, earlier: Tensor, end: Tensor
) -> Tensor:
    """Pseudo-Huber distance of where the student lands from two timesteps of one path (arXiv 2310.04378, Eq. 16).

    Args:
        student, teacher: networks of the schedule's prediction type.
        schedule: of both.
        x: noisy latents (b, f, c, h, w), on the networks' device.
        t, earlier, end: where they are, where the teacher takes them, and the end of the phase; timesteps (b,), on the
            CPU, t > earlier >= end; -1 is clean.

    Returns:
        The mean distance, in units of the clean latents that are in what is compared.
    """
    with torch.no_grad():
        moved = jump(teacher, schedule, x, t, earlier)
        there = (earlier == end).reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
        target = torch.where(there, moved, jump(student, schedule, moved, earlier, end))
    signal = schedule.alpha_at(end).sqrt().reshape(-1, *[1] * (x.ndim - 1)).to(x)
    difference = (jump(student, schedule, x, t, end) - target) / signal
    return ((difference.square() + HUBER**2).sqrt() - HUBER).mean()


def jump(denoise: Denoise, schedule: NoiseSchedule, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """x at timesteps t (b,) taken to the timesteps `end` (b,) by one step of DDIM (arXiv 2010.02502, Eq. 12)."""
    clean, noise = schedule.clean_and_noise(denoise(x, t.clamp(min=0).to(x.device)).float(), x, t)
    return schedule.add_noise(clean, noise, end)
