"""From a request, contexts and noise to clean latents: the network, features, windows, guidance, a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from animatediff.config.keyframes import Keyframes
from animatediff.config.request import Request
from animatediff.diffusion.guidance import Denoise, classifier_free_guidance
from animatediff.diffusion.samplers import Callback, Steps, find_sampler
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.extend import chain_window, extend_video, extension_windows
from animatediff.features.feature import Feature, FrameDenoise, Run, Spread, in_turn
from animatediff.features.freeinit import free_init
from animatediff.features.inputs import PixelInputs, steps_taken
from animatediff.features.known_frames import KnownFrames, encode_known
from animatediff.features.looping import pingpong, rotate_loop
from animatediff.features.micro_conditioning import added_conditioning
from animatediff.features.noise import arrange_noise, draw_noise
from animatediff.features.prompt_travel import Context, text_of_frames
from animatediff.features.registry import FEATURES
from animatediff.features.windows import full_clip, sliding_windows
from animatediff.pipeline.model import Model
from animatediff.pipeline.resolve import plan_steps

UNGUIDED = 1e-3  # a guidance scale as close to 1 as that is 1: 3 times 0.333, too


@dataclass(frozen=True)
class ClipSampler:
    """What b clips are sampled by.

    Attributes:
        request: nothing left open.
        context, negative: of all clips; `negative` where guidance needs it.
        generators: of each clip's noise.
        inputs: pictures and video to start from.
        inversion_context: of what the video shows, for DDIM inversion.
        callback: called after every step with its number, its timestep and the new latents.
        estimated: called with every x_0 that is predicted.
        features: what reaches into the network.
        video_latents: (b, f, c, h, w), in place of those that the VAE makes of the inputs' video.
        cache: of this clip's features.
        spread: of `Run`.
    """

    model: Model
    request: Request
    context: Context
    negative: Context | None
    generators: Sequence[torch.Generator]
    inputs: PixelInputs | None = None
    inversion_context: Context | None = None
    callback: Callback | None = None
    estimated: Callable[[Tensor], None] | None = None
    features: Sequence[Feature] = FEATURES
    video_latents: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    spread: Spread = in_turn

    def draw(self, frames: int) -> Tensor:
        """Noise (b, f, c, h, w) of each clip's own generator."""
        m, r, w = self.model, self.request, self.request.windows
        side = m.vae.config.downsampling
        noise = draw_noise(self.generators, (m.vae.config.latent_channels, frames, r.size.height // side,
                                             r.size.width // side))  # fmt: skip
        apart = {"length": w.length, "stride": w.length - w.overlap} if w else {}  # type: ignore[operator]
        return arrange_noise(noise, r.noise.type, self.generators, **apart).to(m.device)

    def sample(self, noise: Tensor) -> Tensor:
        """Clean latents (b, f, c, h, w) from start noise of that shape; of more frames with `loop: pingpong`."""
        m, r, inputs = self.model, self.request, self.inputs
        if inputs is None:
            x = self._iterated(noise)
        else:
            known = encode_known(
                inputs, m.vae, frames=noise.shape[1], clips=len(noise), device=m.device,
                video_latents=self.video_latents,
            )  # fmt: skip
            if inputs.extend:
                window = noise.shape[1] if r.windows else chain_window(max_frames(m))
                x = extend_video(
                    self._iterated, known.clean, noise, window=window, overlap=inputs.extend, ramp=inputs.image_ramp
                )
            else:
                x = self._iterated(noise, known)
        return pingpong(x) if r.loop.mode == "pingpong" else x

    def _iterated(self, noise: Tensor, known: KnownFrames | None = None, first_frame: int = 0) -> Tensor:
        """Once, or as often as FreeInit wants it; `first_frame` is the number of the first frame in its clip."""

        def once(noise: Tensor, iteration: int = 0) -> Tensor:
            return self._once(noise, known, first_frame, iteration)

        if (freeinit := self.request.freeinit) is None:
            return once(noise)
        schedule = NoiseSchedule(self.model.schedule)
        return free_init(once, noise, freeinit, schedule=schedule, noise=lambda: self.draw(noise.shape[1]))

    def _once(self, noise: Tensor, known: KnownFrames | None, first_frame: int, iteration: int) -> Tensor:
        r, s = self.request, self.request.sampling
        steps = r.freeinit.steps(iteration, s.steps) if r.freeinit else s.steps
        schedule, every = plan_steps(s, self.model.schedule, steps)
        timesteps = every[len(every) - steps_taken(len(every), self.inputs.strength) :] if self.inputs else every
        run = self._run(schedule, timesteps, first_frame)
        x, restore = noise, None
        if known and self.inputs:
            x, restore = known.begin(
                noise,
                schedule=schedule,
                timesteps=timesteps,
                all_steps=len(timesteps) == len(every),
                unguided=self._unguided(run) if self.inputs.inversion else None,
            )
        if not len(timesteps):
            return x

        def after_step(step: int, timestep: int, x: Tensor) -> None:
            for told in (restore, self.callback):
                if told:
                    told(step, timestep, x)

        with guided_denoiser(run, self.features) as denoise:
            draw = lambda: self.draw(x.shape[1])  # noqa: E731
            steps_to_take = Steps(denoise, schedule, timesteps, draw, after_step, self.estimated)
            return find_sampler(s.sampler, eta=s.eta)(x, steps_to_take)

    def _run(self, schedule: NoiseSchedule, timesteps: Tensor, first_frame: int) -> Run:
        parts = {"unconditional": self.negative, "conditional": self.context}
        if self.request.sampling.guidance_scale <= 1:
            del parts["unconditional"]
        if self.request.pag.scale:
            parts["perturbed"] = self.context
        contexts = {name: context for name, context in parts.items() if context is not None}
        run = make_run(self.model, self.request, contexts, schedule, timesteps, first_frame, self.cache)
        return replace(run, spread=self.spread)

    def _unguided(self, run: Run) -> Denoise:
        """The network's own prediction for the inversion's prompt, with windows and without any feature."""
        assert self.inversion_context is not None
        straight = replace(run.request, loop=replace(run.request.loop, mode=""))
        plain = make_run(self.model, straight, {"conditional": self.inversion_context}, run.schedule, run.timesteps)
        return over_frames(network(plain), replace(plain, first_frame=run.first_frame, spread=self.spread))


def make_run(
    model: Model,
    request: Request,
    contexts: dict[str, Context],
    schedule: NoiseSchedule,
    timesteps: Tensor,
    first_frame: int = 0,
    cache: dict[str, Any] | None = None,
) -> Run:
    """A run of a sampler whose batch has these parts, each with its text."""
    like = model.unet.conv_in.weight
    text = text_of_frames(list(contexts.values()), like=like)
    refiner = model.text_encoder is None
    added = added_conditioning(contexts, request, model.recipe, refiner=refiner, like=like)
    parts = tuple(contexts)
    return Run(model, request, schedule, timesteps, text, parts, first_frame, {} if cache is None else cache, added)


@contextmanager
def guided_denoiser(run: Run, features: Sequence[Feature] = FEATURES) -> Iterator[Denoise]:
    """The network, features around it, windows of frames around these, guidance around all.

    Where parts are apart, or not the same at every step, features are put around the network anew.
    """
    shared = run.spread is not in_turn and not run.request.windows
    split = (run.request.memory.split_guidance or shared) and len(run.parts) > 1
    if not split and _scheduled_scale(run) is None:
        with steered(run, features) as denoise:
            yield guided(over_frames(denoise, run), run)
        return
    loras, r = run.model.loras, run.request.loras
    scheduled = r.schedule is not None or r.motion_schedule is not None
    with loras.unmerged() if scheduled else nullcontext():  # once, and not at every step
        yield step_by_step(run, features, split=split)


@contextmanager
def steered(run: Run, features: Sequence[Feature]) -> Iterator[FrameDenoise]:
    """The network, features around it."""
    with ExitStack() as stack:
        denoise = network(run)
        for feature in features:
            denoise = stack.enter_context(feature(denoise, run))
        yield denoise


def step_by_step(run: Run, features: Sequence[Feature], *, split: bool) -> Denoise:
    """A guided denoiser that leaves the unconditional part out at steps where all frames have a scale of 1.

    Args:
        split: the parts that are left go through the network one by one.
    """
    factors, scale = _scheduled_scale(run), run.request.sampling.guidance_scale
    unguided = _without_guidance(run) if factors else run

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        at_one = factors is not None and all(abs(scale * factor - 1) < UNGUIDED for factor in factors(x, t))
        now = unguided if at_one else run
        if split and len(now.parts) > 1:
            return guided(part_by_part(now, features), now)(x, t)
        with steered(now, features) as one:
            return guided(over_frames(one, now), now)(x, t)

    return denoise


def part_by_part(run: Run, features: Sequence[Feature]) -> Denoise:
    """A denoiser of all parts of the batch, one after the other: each is a batch of its own to network and features.

    What is shared with other processes is their windows, or, without these, the parts.
    """
    runs = [_parts(run, slice(i, i + 1)) for i in range(len(run.parts))]
    spread = in_turn if run.request.windows else run.spread

    def predict(part: Run, x: Tensor, t: Tensor) -> Tensor:
        with steered(part, features) as one:
            return over_frames(one, part)(x, t)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        xs, ts = x.chunk(len(runs)), t.chunk(len(runs))
        return torch.cat(list(spread([partial(predict, *each) for each in zip(runs, xs, ts, strict=True)], xs[0])))

    return denoise


def _parts(run: Run, kept: slice) -> Run:
    """A run of some parts alone, with a cache of its own that lasts as long as the clip."""
    n, names = len(run.parts), run.parts[kept]

    def of(all_parts: Tensor) -> Tensor:
        return torch.cat(all_parts.chunk(n)[kept])

    def text(frames: Tensor) -> Tensor:
        return of(run.text(frames))

    def added(frames: Tensor) -> dict[str, Tensor]:
        return {key: of(value) for key, value in run.added(frames).items()}

    cache = run.once(f"parts {names}", dict)
    return replace(run, parts=names, text=text, added=added, cache=cache)


def _without_guidance(run: Run) -> Run:
    """Without the unconditional part, which is the first."""
    r = run.request
    alone = replace(r, sampling=replace(r.sampling, guidance_scale=1.0), guidance=replace(r.guidance, schedule=None))
    return replace(_parts(run, slice(1, None)), request=alone)


def network(run: Run) -> FrameDenoise:
    """The UNet; latents stay in the caller's dtype (float32 in all pipelines), only the network sees its own."""
    unet, weight = run.model.unet, run.model.unet.conv_in.weight

    def predict(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        return unet(x.to(weight.dtype), t, run.text(frames), **run.added(frames), **inputs).to(x.dtype)

    return predict


def over_frames(denoise: FrameDenoise, run: Run) -> Denoise:
    """A denoiser of whole clips: all frames at once, in windows, or rotated."""
    if run.request.loop.mode == "rotate":
        return rotate_loop(denoise, run.timesteps)
    if run.request.windows:
        return sliding_windows(denoise, run.request.windows, run.timesteps, spread=run.spread)
    return full_clip(denoise, run.first_frame)


def guided(denoise: Denoise, run: Run) -> Denoise:
    """A guided denoiser from one of all parts of the batch."""
    options, scale = run.request.guidance, run.request.sampling.guidance_scale
    if run.parts == ("conditional",):
        return denoise
    factors = _scheduled_scale(run)

    def factor(x: Tensor, t: Tensor) -> Tensor:
        assert factors is not None
        return x.new_tensor(factors(x, t))[:, None, None, None]

    return classifier_free_guidance(
        denoise,
        scale,
        factor=factor if factors else None,
        perturbed_scale=run.request.pag.scale,
        rescaled=options.rescale,
    )


def _scheduled_scale(run: Run) -> Callable[[Tensor, Tensor], list[float]] | None:
    """Of latents (b, f, c, h, w) and t (b,), the factor of the guidance scale for each frame; None: always 1."""
    if run.request.guidance.schedule is None:
        return None
    schedule = Keyframes.read(run.request.guidance.schedule)

    def factors(x: Tensor, t: Tensor) -> list[float]:
        return [schedule.at(run.first_frame + frame, run.progress(t)) for frame in range(x.shape[1])]

    return factors


def max_frames(model: Model) -> int | None:
    """The longest clip its motion module takes; None without one."""
    motion = model.unet.config.motion
    return motion.max_frames if motion else None


def count_steps(request: Request, *, longest: int | None, known: int = 0) -> int:
    """Steps that a sampler takes for one clip of a resolved request, in all iterations and windows.

    Args:
        longest: the longest clip that the motion module takes.
        known: frames of the video that is extended.
    """
    s, free = request.sampling, request.freeinit
    steps = [free.steps(i, s.steps) if free else s.steps for i in range(free.iterations if free else 1)]
    if (strength := request.inputs.strength) is not None:
        steps = [steps_taken(count, strength) for count in steps]
    windows = 1
    if known and not request.windows:
        chain = {"window": chain_window(longest), "overlap": request.inputs.extend}
        windows = len(extension_windows(known, request.size.num_frames, **chain))
    return sum(steps) * windows
