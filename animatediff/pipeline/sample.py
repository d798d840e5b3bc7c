"""From a call of the pipeline, everything in it decided, to clean latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from animatediff.config.steering import Steering
from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.samplers import Steps, find_sampler
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.freeinit import free_init
from animatediff.features.noise import arrange_noise
from animatediff.features.prompt_travel import Context
from animatediff.features.sparsectrl import Control
from animatediff.features.windows import Windows
from animatediff.pipeline.denoiser import make_denoiser
from animatediff.pipeline.model import Components, draw_noise
from animatediff.pipeline.prompts import encode_prompts
from animatediff.pipeline.sampling import Sampling
from animatediff.pipeline.start import Given, Start, encode_start, go_on
from animatediff.pipeline.steered import steer


@dataclass(frozen=True)
class ClipSampler:
    """What b clips of f frames are sampled by.

    Attributes:
        context, negative: of all clips; `negative` where guidance needs it.
        generators: of each clip's noise.
        latent_size: (c, h, w).
        windows: that every step is cut into.
        window: frames of each window of a clip that goes on, without `windows`.
        control: what the network is told of given frames (SparseCtrl).
        given: pictures and video to start from.
        inversion_prompt: what the given video shows.
        callback: called after every step with its timestep and the new latents.
    """

    components: Components
    sampling: Sampling
    steering: Steering
    context: Context
    negative: Context | None
    generators: Sequence[torch.Generator]
    latent_size: tuple[int, int, int]
    windows: Windows | None
    window: int
    control: Control | None
    given: Given | None
    inversion_prompt: str
    callback: Callable[[int, Tensor], None]

    def draw(self, frames: int) -> Tensor:
        """Noise (b, f, c, h, w) of each clip's own generator."""
        c, *size = self.latent_size
        w = self.windows
        apart = {"length": w.length, "stride": w.length - w.overlap} if w else {}
        noise = draw_noise(self.generators, (c, frames, *size))
        return arrange_noise(noise, self.steering.noise_type, self.generators, **apart).to(self.components.device)

    def sample(self, noise: Tensor) -> Tensor:
        """Clean latents (b, f, c, h, w) from start noise of that shape; of more frames with `loop="pingpong"`."""
        c, given, frames = self.components, self.given, noise.shape[1]
        if given is None:
            x = self._iterated(noise)
        else:
            start = encode_start(given, c.vae, frames=frames, clips=len(noise), device=c.device)
            if given.extend:
                window = frames if self.windows else self.window
                ramp = given.image_ramp
                x = go_on(self._iterated, start.clean, noise, window=window, overlap=given.extend, ramp=ramp)
            else:
                x = self._iterated(noise, start)
        return torch.cat([x, x[:, 1:-1].flip(1)], dim=1) if self.steering.loop == "pingpong" else x

    def _iterated(self, noise: Tensor, start: Start | None = None, first_frame: int = 0) -> Tensor:
        """Once, or as often as FreeInit wants it; `first_frame` is the number of the first frame in its clip."""

        def once(noise: Tensor, iteration: int = 0) -> Tensor:
            return self._once(noise, start, first_frame, iteration)

        if (freeinit := self.steering.freeinit) is None:
            return once(noise)
        schedule = NoiseSchedule(self.components.schedule)
        return free_init(once, noise, freeinit, schedule=schedule, noise=lambda: self.draw(noise.shape[1]))

    def _once(self, noise: Tensor, start: Start | None, first_frame: int, iteration: int) -> Tensor:
        c, sampling, given, said = self.components, self.sampling, self.given, self.steering
        schedule, timesteps = sampling.part(said.freeinit, iteration).plan(c.schedule)
        levels = timesteps[len(timesteps) - given.steps(len(timesteps)) :] if given else timesteps
        windows = (self.windows, levels) if self.windows else None
        x, put_back = noise, None
        if start and given:
            x, put_back = start.begin(
                noise,
                schedule=schedule,
                timesteps=levels,
                all_steps=len(levels) == len(timesteps),
                unguided=self._unguided(windows, first_frame, frames=noise.shape[1]) if given.inversion else None,
            )
        if not len(levels):
            return x

        def after_step(step: int, timestep: int, x: Tensor) -> None:
            if put_back:
                put_back(step, timestep, x)
            self.callback(timestep, x)

        scale = sampling.guidance_scale
        height, width = (side * c.vae.config.downsampling for side in self.latent_size[1:])
        with steer(c, said, levels, guided=scale > 1, size=(height, width)) as steered:
            denoise = make_denoiser(
                c.unet,
                self.context,
                negative_context=self.negative,
                guidance_scale=scale,
                windows=windows,
                first_frame=first_frame,
                control=self.control,
                steered=steered,
            )
            steps = Steps(denoise, schedule, levels, noise=lambda: self.draw(x.shape[1]), callback=after_step)
            return find_sampler(sampling.sampler, eta=sampling.eta)(x, steps)

    def _unguided(self, windows: tuple[Windows, Tensor] | None, first_frame: int, *, frames: int) -> Denoise:
        """The network's own prediction for the inversion's prompt."""
        c, prompts = self.components, [self.inversion_prompt] * len(self.context)
        context, _ = encode_prompts(c, prompts, None, guided=False, num_frames=frames)
        return make_denoiser(c.unet, context, windows=windows, first_frame=first_frame)
