"""Text to animation: the pipeline, under the argument names that diffusers and mmagic users type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from animatediff.checkpoints.textual_inversion import load_textual_inversion
from animatediff.config.prompt_yaml import Prompt, load_config
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.prompt_travel import Travel
from animatediff.features.sparsectrl import ConditionImages, make_control
from animatediff.features.windows import Windows
from animatediff.media.video import to_uint8
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.call_checks import check_call
from animatediff.pipeline.model import Components, draw_seed, pick_device, pick_dtype, place, seeded
from animatediff.pipeline.outputs import decode
from animatediff.pipeline.prompts import Prompts, encode_prompts
from animatediff.pipeline.sample import ClipSampler
from animatediff.pipeline.sampling import Sampling, complete_sampling
from animatediff.pipeline.start import Pictures, chain_window, check_start, take_given
from animatediff.pipeline.weights import check_entries
from animatediff.utils import UserError

RETURN_TYPES = {"tensor": "tensor", "numpy": "tensor", "image": "pil"}
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
        for module in (c.unet, c.vae, c.text_encoder, *([c.sparsectrl] if c.sparsectrl else [])):
            place(module, torch.device(device), dtype or c.dtype)
        return self

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> None:
        """Let a word of the prompts stand for a textual inversion; see `checkpoints.textual_inversion`.

        Args:
            path: .pt, .bin or .safetensors.
            token: the word; by default the file's stem, and the token that the file itself names.

        Raises:
            UserError: another kind of file, vectors of another width, or a word that is there already.
        """
        load_textual_inversion(path, self.components.text_encoder, self.components.tokenizer, name=token or "")

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
        decode_chunk_size: int = 8,
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
        travel: Travel | None = None,
        prompt_weighting: bool | None = None,
        clip_skip: int | None = None,
        conditioning_frames: ConditionImages | None = None,
        controlnet_frame_indices: Sequence[int] = (0,),
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        **steering: Any,
    ) -> AnimateDiffOutput | tuple[Any]:
        """Animate prompts; arguments, defaults and layouts are those of diffusers' AnimateDiffPipeline.

        Args:
            prompt: a text or several (b of them); of any length, none is cut. Instead of a text, keyframes: with
                {0: "…", 15: "…"} the prompt travels from the one text to the other.
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
            travel: how prompts get from keyframe to keyframe; by default as the config says.
            prompt_weighting: read `(word:1.2)`, `[word]` and `BREAK` in prompts and negative prompts; by default as the
                config says, else not: the official code takes brackets as text.
            clip_skip: the layer of the text encoder to take, from the end: 1 the last, 2 the one before it, as in
                AUTOMATIC1111's web UI (diffusers counts from 0); by default as the config says, else 1.
            conditioning_frames: images of some frames for SparseCtrl: files, PIL images (cut to the clip's shape and
                resized), or a tensor (n, 3, H, W) in [0, 1].
            controlnet_frame_indices: the frame of each image, from 0; -1 is the last one.
            controlnet_conditioning_scale: how much the images count, for all frames or for each; 1 as trained.
            steering: fields of `Steering`, such as `motion_scale=0.5` or `freeinit=FreeInit()`; by default the
                config's.

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
        windows, said = windows or c.windows, c.steering.changed(**steering)
        motion = c.unet.config.motion is not None
        said.check(num_frames, windows=windows is not None, motion=motion, loras=c.lora_keys.values())
        sampling.check_steering(said, c.distillation)
        window = chain_window(c.unet.config.motion.max_frames if c.unet.config.motion else None)
        at_once = min(num_frames, window) if extend and not windows else num_frames
        check_call(
            c,
            sampling,
            num_frames=at_once,
            height=height,
            width=width,
            num_videos_per_prompt=num_videos_per_prompt,
            windows=windows,
            stretch=said.pe_stretch,
            output_type=output_type,
        )
        control = make_control(
            c,
            conditioning_frames,
            controlnet_frame_indices,
            controlnet_conditioning_scale,
            frames=num_frames,
            window=min(num_frames, windows.length) if windows else at_once,
            size=(height, width),
        )
        context, negative = encode_prompts(
            c,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            guided=guidance_scale > 1,
            num_frames=num_frames,
            videos=num_videos_per_prompt,
            loop=said.loop == "rotate" or (windows is not None and windows.loops),
            travel=travel,
            prompt_weighting=prompt_weighting,
            clip_skip=clip_skip,
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
        if given:
            check_start(given, sampling, said)
        done = 0

        def after_step(timestep: int, x: Tensor) -> None:
            nonlocal done
            done += 1
            if callback_on_step_end is None:
                return
            seen = rearrange(x, "b f c h w -> b c f h w")
            wanted = (callback_on_step_end(self, done - 1, timestep, {"latents": seen}) or {}).get("latents", seen)
            if wanted is not seen:
                x.copy_(_given_latents(wanted, tuple(seen.shape)))

        clips = ClipSampler(
            c,
            sampling,
            said,
            context,
            negative,
            _generators(generator, len(context)),
            (c.unet.config.in_channels, *(side // c.vae.config.downsampling for side in (height, width))),
            windows=windows,
            window=window,
            control=control,
            given=given,
            inversion_prompt=inversion_prompt,
            callback=after_step,
        )
        if latents is None:
            noise = clips.draw(num_frames)
        else:
            channels, *size = clips.latent_size
            noise = _given_latents(latents, (len(context), channels, num_frames, *size)).to(c.device)
        x = clips.sample(noise)
        frames = decode(c.vae, x, output_type, chunk_frames=decode_chunk_size)
        return AnimateDiffOutput(frames) if return_dict else (frames,)

    def infer(
        self,
        prompt: Prompt | Sequence[Prompt],
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
        freeinit = self.components.steering.freeinit
        steps = sum(self.complete_sampling(steps=num_inference_steps).iteration_steps(freeinit))
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

    @torch.no_grad()
    def decode_frames(self, latents: Tensor, *, chunk: int = 8) -> Iterator[np.ndarray]:
        """The frames of one clip, uint8 (H, W, 3), one after the other: only `chunk` of them are there at a time.

        Args:
            latents: (1, c, f, h, w), as the output type "latent" gives them.
        """
        for part in latents.split(chunk, dim=2):
            yield from to_uint8(
                decode(self.components.vae, rearrange(part, "b c f h w -> b f c h w"), "pt", chunk_frames=chunk)[0]
            )


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
