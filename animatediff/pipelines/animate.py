"""Text to animation: the pipeline, under the argument names that diffusers and mmagic users type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from animatediff.config import load_config
from animatediff.data.video_io import to_uint8
from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.samplers import find_sampler
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.diffusion.windows import Windows
from animatediff.pipelines.assemble import Assembler
from animatediff.pipelines.components import Components, draw_noise, draw_seed, pick_device, pick_dtype, place, seeded
from animatediff.pipelines.denoiser import make_denoiser
from animatediff.pipelines.sampling import Sampling, complete_sampling
from animatediff.pipelines.start import (
    Pictures,
    Start,
    chain_window,
    check_inversion,
    encode_start,
    go_on,
    take_given,
)
from animatediff.pipelines.weights import check_entries
from animatediff.utils import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "tensor", "latent")
RETURN_TYPES = {"tensor": "tensor", "numpy": "tensor", "image": "pil"}
Prompts = str | Sequence[str] | None
Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[["AnimateDiffPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class AnimateDiffOutput:
    """The clips; `videos` is the official pipeline's name for them."""

    frames: Any

    @property
    def videos(self) -> Any:
        return self.frames


class AnimateDiffPipeline:
    """A loaded model that animates prompts.

    Attributes:
        components: the networks, and `components.loras`, whose scales may be changed between calls.
        default_size: (height, width) in pixels where a call does not say.
    """

    def __init__(self, components: Components, *, default_size: tuple[int, int] = (512, 512)):
        self.components = components
        self.default_size = default_size

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        *,
        entry: int = 0,
        device: str = "auto",
        dtype: str | None = None,
        **overrides: Any,
    ) -> AnimateDiffPipeline:
        """Load the model of one entry of a prompt config; its prompts are not used.

        Args:
            path: a YAML file, such as configs/animate/shapes.yaml.
            entry: which entry, from 0.
            device: auto, cuda, mps or cpu.
            dtype: float32, float16 or bfloat16; by default what suits the device.
            overrides: values for keys of the entry, such as `motion_module="…"`.

        Raises:
            UserError: whatever is wrong with the config or its files.
        """
        entries = load_config(path, overrides).entries
        if not 0 <= entry < len(entries):
            raise UserError(f"got entry {entry}, but {path} has {len(entries)}: count from 0")
        target = pick_device(device)
        (checked,) = check_entries([entries[entry]])
        components = Assembler(target, pick_dtype(dtype, target)).assemble(checked)
        return cls(components, default_size=(entries[entry].H, entries[entry].W))

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> AnimateDiffPipeline:
        """Move all networks."""
        c = self.components
        for module in (c.unet, c.vae, c.text_encoder):
            place(module, torch.device(device), dtype or c.dtype)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts = None,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompts = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        decode_chunk_size: int = 16,
        *,
        sampler: str | None = None,
        timestep_spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        windows: Windows | None = None,
        video: Pictures = None,
        image: Pictures = None,
        last_image: Pictures = None,
        mask: Pictures = None,
        strength: float | None = None,
        inversion: bool = False,
        inversion_prompt: str = "",
        extend: int = 0,
        image_ramp: float = 32.0,
    ) -> AnimateDiffOutput | tuple[Any]:
        """Animate prompts; arguments, defaults and layouts are those of diffusers' AnimateDiffPipeline.

        Args:
            prompt: a text or several (b of them); of any length, none is cut.
            num_frames: of every clip (f), without `windows` at most what the motion module was trained on.
            height, width: pixels, multiples of the VAE's down-sampling (8).
            num_inference_steps: 1 to 1000; by default 50, or what a distilled motion module needs.
            guidance_scale: 0 or more, 7.5 by default or as above; at 1 and below the negative prompt does nothing.
            negative_prompt: one for all prompts, or one for each; "" by default.
            num_videos_per_prompt: clips of each prompt (v).
            eta: of ddim, 0 (deterministic) to 1 (as much noise in every step as DDPM has).
            generator: where the noise comes from: one, drawn from clip by clip, or one per clip. A CPU generator
                gives the same clips on every device. By default a fresh seed.
            latents: start noise (b v, c, f, h, w), instead of drawing it.
            prompt_embeds: text embedding (b, l, d), instead of `prompt`.
            negative_prompt_embeds: (b, l, d), instead of `negative_prompt`; of as many tokens as the prompt's.
            output_type: "pil" a list of images per clip; "np" floats in [0, 1] (b v, f, H, W, 3); "pt" the same as a
                tensor (b v, f, 3, H, W); "tensor" the official (b v, 3, f, H, W); "latent" (b v, c, f, h, w), scaled.
            return_dict: False for a tuple of one.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": (b v, c, f, h, w)})`
                after every step; may return a dict with other latents to go on from.
            decode_chunk_size: frames that the VAE decodes at a time.
            sampler: a key of SAMPLERS; by default the config's, else ddim.
            timestep_spacing: one of SPACINGS; by default the config's, else the sampler's own.
            timesteps: those to visit, falling, instead of `num_inference_steps` of them; may be fractional.
            sigmas: the same as noise levels sqrt((1 - abar) / abar); a final 0 may be there.
            windows: the overlapping windows of frames that a long clip is animated in; by default the config's.
            video: a clip to start from: PIL images, which are cropped and resized, or a tensor in [-1, 1]
                (f, 3, H, W); one for all, or a list of lists or (b v, f, 3, H, W). A single picture stands still.
            image, last_image: of the first and the last frame, which are kept: a PIL image or (3, H, W) in [-1, 1].
            mask: where the video is painted anew, white (1); elsewhere its latents are kept. One picture, or one per
                frame: PIL images, or (f, 1, H, W) in [0, 1].
            strength: how much of the start is noise, 0 (the video comes back) to 1 (as without one); of the steps the
                last int(steps * strength) are taken. By default 0.8; 0.9 with an image, 1 with `mask` or `extend`.
            inversion: start from the noise that DDIM inversion finds in the video, instead of fresh noise.
            inversion_prompt: what the video shows, for the inversion.
            extend: go on from the video's end to `num_frames` frames: without `windows` in a chain of windows of 16,
                in each of which so many frames are known already, or more.
            image_ramp: frames after which nothing of an image (or of the last frame to go on from) is left at the
                start; matters where strength is below 1.

        Raises:
            UserError: an argument is out of range, or two do not fit together.
        """
        c = self.components
        height, width = height or self.default_size[0], width or self.default_size[1]
        if sigmas is not None:
            if timesteps is not None:
                raise UserError("got both timesteps and sigmas, expected one of them")
            timesteps = NoiseSchedule(c.schedule).timesteps_of([s for s in sigmas if s]).tolist()
        sampling = self.complete_sampling(
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            sampler=sampler,
            timestep_spacing=timestep_spacing,
            timesteps=tuple(timesteps or ()),
        )
        guidance_scale = sampling.guidance_scale
        windows = windows or c.windows
        window = chain_window(c.unet.config.motion.max_frames if c.unet.config.motion else None)
        at_once = min(num_frames, window) if extend and not windows else num_frames
        self._check(at_once, height, width, sampling, num_videos_per_prompt, windows)
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"got output_type {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        context, negative = self._encode(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale)
        context, negative = (
            repeat(text, "b l d -> (b v) l d", v=num_videos_per_prompt) if text is not None else None
            for text in (context, negative)
        )
        generators = _generators(generator, len(context))
        shape = (
            c.unet.config.in_channels,
            num_frames,
            *(side // c.vae.config.downsampling for side in (height, width)),
        )
        given = take_given(
            video=video,
            image=image,
            last_image=last_image,
            mask=mask,
            strength=strength,
            inversion=inversion,
            extend=extend,
            image_ramp=image_ramp,
            frames=num_frames,
            height=height,
            width=width,
            window=window,
            clips=len(context),
        )
        if inversion:
            check_inversion(sampling)
        x = draw_noise(generators, shape) if latents is None else _given_latents(latents, (len(context), *shape))
        x = x.to(c.device)
        schedule, timesteps = sampling.plan(c.schedule)
        levels = timesteps[len(timesteps) - given.steps(len(timesteps)) :] if given else timesteps

        def denoiser(context: Tensor, scale: float = 1.0, first_frame: int = 0) -> Denoise:
            return make_denoiser(
                c.unet,
                context,
                negative_context=negative,
                guidance_scale=scale,
                windows=(windows, levels) if windows else None,
                first_frame=first_frame,
            )

        def sample(noise: Tensor, start: Start | None = None, first_frame: int = 0) -> Tensor:
            x, put_back = noise, None
            if start:
                x, put_back = start.begin(
                    noise,
                    schedule=schedule,
                    timesteps=levels,
                    all_steps=len(levels) == len(timesteps),
                    unguided=denoiser(self._embed([inversion_prompt] * len(context))) if inversion else None,
                )

            def after_step(step: int, timestep: int, x: Tensor) -> None:
                if put_back:
                    put_back(step, timestep, x)
                if callback_on_step_end is None:
                    return
                seen = rearrange(x, "b f c h w -> b c f h w")
                wanted = (callback_on_step_end(self, step, timestep, {"latents": seen}) or {}).get("latents", seen)
                if wanted is not seen:
                    x.copy_(_given_latents(wanted, tuple(seen.shape)))

            if not len(levels):
                return x
            return find_sampler(sampling.sampler, eta=eta)(
                denoiser(context, guidance_scale, first_frame),
                x,
                schedule=schedule,
                timesteps=levels,
                noise=lambda: draw_noise(generators, (shape[0], x.shape[1], *shape[2:])).to(c.device),
                callback=after_step,
            )

        start = encode_start(given, c.vae, frames=num_frames, clips=len(context), device=c.device) if given else None
        if start and extend:
            x = go_on(sample, start.clean, x, window=num_frames if windows else window, overlap=extend, ramp=image_ramp)
        else:
            x = sample(x, start)
        frames = self._decode(x, output_type, decode_chunk_size)
        return AnimateDiffOutput(frames) if return_dict else (frames,)

    def infer(
        self,
        prompt: str | Sequence[str],
        video_length: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompts = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        return_type: str = "tensor",
        show_progress: bool = True,
        seed: int = 1007,
    ) -> dict[str, Any]:
        """`__call__` as mmagic's AnimateDiff has it.

        Args:
            video_length: frames (f).
            return_type: "tensor", or "numpy": floats in [0, 1] (b, 3, f, H, W); "image": a list of PIL images per
                clip.
            show_progress: draw a bar of the steps on stderr.
            seed: of the noise where no `generator` is given; -1 draws one.
            The others are those of `__call__`.

        Returns:
            {"samples": the clips}.

        Raises:
            UserError: as `__call__`.
        """
        if return_type not in RETURN_TYPES:
            raise UserError(f"got return_type {return_type!r}, expected one of {', '.join(RETURN_TYPES)}")
        steps = self.complete_sampling(steps=num_inference_steps).steps
        with tqdm(total=max(steps, 0), disable=not show_progress, desc="animating", unit="step") as bar:
            (samples,) = self(
                prompt,
                video_length,
                height,
                width,
                num_inference_steps,
                guidance_scale,
                negative_prompt,
                num_videos_per_prompt,
                eta,
                generator or seeded(draw_seed() if seed == -1 else seed),
                latents,
                output_type=RETURN_TYPES[return_type],
                return_dict=False,
                callback_on_step_end=advance(bar),
            )
        return {"samples": samples.numpy() if return_type == "numpy" else samples}

    def complete_sampling(self, **asked: Any) -> Sampling:
        """The sampling of a call with these fields of Sampling; raises as `__call__` does."""
        c = self.components
        defaults = Sampling(c.sampler, c.schedule.timestep_spacing, steps=50)
        return complete_sampling(asked, defaults, c.distillation)

    def _check(
        self, frames: int, height: int, width: int, sampling: Sampling, videos: int, windows: Windows | None
    ) -> None:
        for name, value in (
            ("num_frames", frames),
            ("height", height),
            ("width", width),
            ("num_inference_steps", sampling.steps),
            ("num_videos_per_prompt", videos),
        ):
            if value < 1:
                raise UserError(f"{name}: got {value}, expected at least 1")
        c = self.components
        for name, value in (("height", height), ("width", width)):
            if value % c.vae.config.downsampling:
                raise UserError(f"{name}: got {value} pixels, expected a multiple of {c.vae.config.downsampling}")
        motion = c.unet.config.motion
        if motion and (seen := min(frames, windows.length) if windows else frames) > motion.max_frames:
            what, longest = "window length" if windows else "num_frames", motion.max_frames
            raise UserError(
                f"{what}: got {seen}, expected at most {longest}, the longest clip the {motion.version} motion module "
                f"was trained on: animate in overlapping windows by windows=Windows(length={min(16, longest)}), make a "
                "shorter clip, or set max_frames in the config"
            )
        if sampling.steps > (most := c.schedule.num_train_timesteps):
            raise UserError(f"num_inference_steps: got {sampling.steps}, expected at most {most}")
        if sampling.guidance_scale < 0:
            raise UserError(f"guidance_scale: got {sampling.guidance_scale:g}, expected 0 or more (1 is no guidance)")
        if not 0 <= sampling.eta <= 1:
            raise UserError(f"eta: got {sampling.eta:g}, expected 0 (deterministic) to 1")

    def _encode(
        self,
        prompt: Prompts,
        negative_prompt: Prompts,
        embeds: Tensor | None,
        negative_embeds: Tensor | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Contexts of the prompts and, where guidance needs them, of as many negative prompts: (b, l, d) each."""
        if (prompt is None) == (embeds is None):
            raise UserError("got both or neither of prompt and prompt_embeds, expected one of them")
        if negative_prompt is not None and negative_embeds is not None:
            raise UserError("got both negative_prompt and negative_prompt_embeds, expected one of them")
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts) if embeds is None else len(embeds)
        if not count:
            raise UserError("prompt: got an empty list, expected at least one prompt")
        negatives = [negative_prompt or ""] if isinstance(negative_prompt or "", str) else list(negative_prompt or "")
        negatives = negatives * count if len(negatives) == 1 else negatives
        if len(negatives) != count:
            raise UserError(f"got {len(negatives)} negative prompts for {count} prompts, expected one, or one for each")
        guided = guidance_scale > 1
        # Together, so that prompts and negative prompts come out equally long.
        texts = (prompts if embeds is None else []) + (negatives if guided and negative_embeds is None else [])
        states = self._embed(texts) if texts else None
        context = embeds if embeds is not None else states[:count]  # type: ignore[index]
        if not guided:
            return context, None
        negative = negative_embeds if negative_embeds is not None else states[-count:]  # type: ignore[index]
        if negative.shape != context.shape:
            raise UserError(
                f"got text embeddings {tuple(context.shape)} and negative ones {tuple(negative.shape)}, expected equal "
                "shapes: encode both with as many tokens"
            )
        return context, negative.to(context)

    def _embed(self, texts: list[str]) -> Tensor:
        c = self.components
        ids = c.tokenizer(texts, max_length=c.text_encoder.config.max_length)
        return c.text_encoder.encode(ids.to(c.device))

    @torch.no_grad()
    def decode_frames(self, latents: Tensor, *, chunk: int = 8) -> Iterator[np.ndarray]:
        """The frames of one clip, uint8 (H, W, 3), one after the other: only `chunk` of them are there at a time.

        Args:
            latents: (1, c, f, h, w), as the output type "latent" gives them.
        """
        for part in latents.split(chunk, dim=2):
            yield from to_uint8(self._decode(rearrange(part, "b c f h w -> b f c h w"), "pt", chunk)[0])

    def _decode(self, latents: Tensor, output_type: str, chunk_frames: int) -> Any:
        if output_type == "latent":
            return rearrange(latents, "b f c h w -> b c f h w")
        video = self.components.vae.decode_video(latents, chunk_frames=chunk_frames).float().cpu()
        video = (video / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return video
        if output_type == "tensor":
            return rearrange(video, "b f c h w -> b c f h w")
        if output_type == "np":
            return rearrange(video, "b f c h w -> b f h w c").numpy()
        return [[Image.fromarray(frame) for frame in to_uint8(clip)] for clip in video]


def advance(bar: tqdm) -> StepCallback:
    """A `callback_on_step_end` that moves a progress bar."""

    def after_step(*_: Any) -> None:
        bar.update()

    return after_step


def _generators(generator: Generators, clips: int) -> list[torch.Generator]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator or seeded(draw_seed())] * clips
    if len(generator) != clips:
        raise UserError(f"got {len(generator)} generators for {clips} clips, expected one, or one for each clip")
    return list(generator)


def _given_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents of a caller, (b, c, f, h, w), in the order used inside."""
    if tuple(latents.shape) != shape:
        raise UserError(f"got latents of shape {tuple(latents.shape)}, expected {shape} (clips, c, f, h, w)")
    return rearrange(latents.float(), "b c f h w -> b f c h w")


AnimateDiff = AnimateDiffPipeline  # mmagic's name
