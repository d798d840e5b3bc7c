"""Steering at work: what the network is told anew at every step and for every window, while a clip is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from animatediff.config.keyframes import Keyframes, Varying
from animatediff.config.steering import LORA_SCHEDULES, Steering
from animatediff.diffusion.guidance import Denoise, classifier_free_guidance
from animatediff.diffusion.schedule import step_of
from animatediff.features import interventions
from animatediff.media.mask import read_mask
from animatediff.pipeline.model import Components
from animatediff.pipeline.weights import find_file


class Steered:
    """The steering of one run of a sampler.

    Attributes:
        said: what the user said.
        timesteps: the sampler's (steps,).
        motion_scale: to be hooked into the network, where it is asked for.
    """

    def __init__(self, said: Steering, timesteps: Tensor, components: Components, mask: Tensor | None):
        self.said, self.timesteps = said, timesteps
        self._motion = _keyframes(said.motion_scale, "motion_scale")
        self._guidance = _keyframes(said.guidance_schedule, "guidance_schedule")
        self.motion_scale = None if self._motion is None and mask is None else interventions.MotionScale(mask)
        self.lora_schedules = {
            name: Keyframes.read(raw, schedule)
            for name, key in components.lora_keys.items()
            if (schedule := LORA_SCHEDULES.get(key)) and (raw := getattr(said, schedule)) is not None
        }
        self._stack = components.loras
        self._scales = {name: components.loras.scale(name) for name in self.lora_schedules}

    def aim(self, t: Tensor, frames: Tensor) -> None:
        """Get ready for a call of the network at t (b,), with these frames (w,)."""
        part = self._part(t)
        if self.motion_scale:
            values = [self._motion.at(frame, part) if self._motion else 1.0 for frame in frames.tolist()]
            self.motion_scale.values = torch.tensor(values)
        for name, keyframes in self.lora_schedules.items():
            self._stack.set_scale(name, self._scales[name] * keyframes.at(0, part))

    def guided(self, denoise: Denoise, scale: float, first_frame: int = 0) -> Denoise:
        """A guided denoiser from one of all parts of the batch; `first_frame` is the number of x's first frame."""
        keyframes = self._guidance

        def factor(x: Tensor, t: Tensor) -> Tensor:
            assert keyframes is not None
            values = [keyframes.at(frame, self._part(t)) for frame in range(first_frame, first_frame + x.shape[1])]
            return x.new_tensor(values)[:, None, None, None]

        said = self.said
        return classifier_free_guidance(
            denoise,
            scale,
            factor=factor if keyframes else None,
            perturbed_scale=said.pag_scale,
            rescaled=said.guidance_rescale,
        )

    def restore_loras(self) -> None:
        for name, scale in self._scales.items():
            self._stack.set_scale(name, scale)

    def _part(self, t: Tensor) -> float:
        """Where in the sampling t is: 0 at the first step, 1 at the last."""
        return step_of(self.timesteps, t) / max(len(self.timesteps) - 1, 1)


@contextmanager
def steer(
    components: Components, said: Steering, timesteps: Tensor, *, guided: bool, size: tuple[int, int]
) -> Iterator[Steered | None]:
    """Let steering reach into the network for one run of a sampler; None where there is nothing to steer.

    Args:
        guided: whether the batch has an unconditional part.
        size: (height, width) of the clip in pixels.

    Raises:
        UserError: a layer that is not there, or a mask that cannot be read or is of another size.
    """
    if not said.said():
        yield None
        return
    mask = None
    if said.motion_mask:
        mask = read_mask(find_file(said.motion_mask) or said.motion_mask, height=size[0], width=size[1])
    unet, steered = components.unet, Steered(said, timesteps, components, mask)
    with ExitStack() as stack:
        if steered.motion_scale:
            stack.enter_context(interventions.motion_scaled(unet, steered.motion_scale))
        if said.pe_stretch != 1:
            stack.enter_context(interventions.positions_stretched(unet, said.pe_stretch))
        if said.pag_scale:
            stack.enter_context(interventions.attention_perturbed(unet, said.pag_layers, 2 + guided))
        if said.freeu:
            stack.enter_context(interventions.freed(unet, said.freeu.b, said.freeu.s))
        if steered.lora_schedules:
            stack.enter_context(components.loras.unmerged())
            stack.callback(steered.restore_loras)
        yield steered


def _keyframes(raw: Varying | None, name: str) -> Keyframes | None:
    return None if raw is None else Keyframes.read(raw, name)
