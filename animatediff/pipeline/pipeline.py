"""Text to animation: the pipeline, under the argument names that diffusers and mmagic users type."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from animatediff.checkpoints.textual_inversion import load_textual_inversion
from animatediff.config.networks import usual_size
from animatediff.config.request import Prompts, Request
from animatediff.config.spellings import updated
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.extend import chain_window
from animatediff.features.feature import Feature, Spread, in_turn
from animatediff.features.inputs import prepare_inputs
from animatediff.features.lora_schedule import loras_scaled
from animatediff.features.noise import draw_seed, seeded
from animatediff.features.prompt_travel import Context
from animatediff.features.registry import FEATURES
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.call import (
    AnimateDiffOutput,
    CallArguments,
    Generators,
    StepCallback,
    advance,
    check_call,
    check_networks,
    defaults_for_calls,
    generators_of,
    given_latents,
)
from animatediff.pipeline.compiled import MOST_GRAPHS, CompiledUNet, compile_unet
from animatediff.pipeline.device import pick_device, pick_dtype, to_device
from animatediff.pipeline.finish import Finisher, enlarged_latents
from animatediff.pipeline.fit import fitted
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.memory import apply_memory
from animatediff.pipeline.model import Model
from animatediff.pipeline.outputs import as_bytes, as_output, decode, decode_frames, decode_pixels
from animatediff.pipeline.prompts import encode_prompts, with_pooled
from animatediff.pipeline.rehearse import rehearse
from animatediff.pipeline.remembered import load_run
from animatediff.pipeline.resolve import facts_of, resolve
from animatediff.pipeline.run_folder import recorded_dtype
from animatediff.pipeline.sample import ClipSampler, count_steps, max_frames
from animatediff.pipeline.tagged_loras import refuse_tags
from animatediff.utils import UserError, describe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from animatediff.config.call_options import CallOptions

RETURN_TYPES = {"tensor": "tensor", "numpy": "tensor", "image": "pil"}
CALL_STEPS = 50  # where a call does not say, as in diffusers


class AnimateDiffPipeline:
    """A loaded model that animates prompts.

    Attributes:
        model: the networks, and `model.loras`, whose scales may be changed between calls.
        request: gives the values of all that a call does not say.
        features: what reaches into the network; add your own (docs/architecture.md).
    """

    def __init__(self, model: Model, request: Request | None = None):
        self.model = model
        self.request = request or Request()
        self.features: tuple[Feature, ...] = FEATURES

    @classmethod
    def from_config(
        cls,
        path: str | Path,
        *,
        entry: int = 0,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        **overrides: Any,
    ) -> AnimateDiffPipeline:
        """Load the model of one entry of a prompt config. How it is sampled, in windows or steered, holds for calls,
        too; its prompts, steps, guidance scale, length and pictures do not.

        Args:
            path: a YAML file, such as configs/animate/shapes.yaml, or what else `remembered.load_run` reads.
            entry: which entry, from 0.
            device: auto, cuda, mps or cpu.
            dtype: float32, float16 or bfloat16; by default what suits the device.
            overrides: values for options of the entry, such as `motion_module="…"`.

        Raises:
            UserError: whatever is wrong with the config or its files.
        """
        config, notes = load_run(path, overrides, complete=False)
        for line in notes:
            warnings.warn(line, stacklevel=2)
        entries = config.entries
        if not 0 <= entry < len(entries):
            raise UserError(f"got entry {entry}, but {path} has {len(entries)}: count from 0")
        target = pick_device(device)
        (checked,) = check_requests([entries[entry]], complete=False)
        rehearse([checked], loaded_next=True)
        weights_dtype = pick_dtype(dtype or recorded_dtype(config.provenance, target), target)
        checked = fitted(checked, target, weights_dtype, lambda line: None)
        model = Assembler(target, weights_dtype).assemble(checked)
        return cls(model, replace(defaults_for_calls(entries[entry]), memory=checked.request.memory))

    # ---- the networks -----------------------------------------------------------------------------------------

    @property
    def components(self) -> Model:
        """The networks, by diffusers' name."""
        return self.model

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels where a call does not say."""
        height, width = usual_size(self.model.recipe, self.model.distillation)
        return self.request.size.height or height, self.request.size.width or width

    @property
    def unet(self):
        return self.model.unet

    @property
    def vae(self):
        return self.model.vae

    @property
    def text_encoder(self):
        return self.model.text_encoder

    @property
    def tokenizer(self):
        return self.model.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: str | torch.device | torch.dtype, dtype: torch.dtype | None = None) -> AnimateDiffPipeline:
        """Move all networks to a device, a type, or both.

        Raises:
            UserError: weights rest elsewhere or in fewer bits.
        """
        self._check_whole("moved")
        if isinstance(device, torch.dtype):
            device, dtype = self.device, device
        dtype = dtype or self.dtype
        for module in self.model.modules():
            to_device(module, torch.device(device), dtype)
        return self

    def compile(
        self, *, most_graphs: int = MOST_GRAPHS, cuda_graphs: bool = False, tell: Callable[[str], None] = print
    ) -> CompiledUNet:
        """Compile the UNet by torch.compile at the next calls; the clips stay the same but for rounding.

        Args: see `compiled.compile_unet`. `tell` is told how long each compilation took.

        Returns: the record of what was compiled, whose `undo()` takes it back.
        """
        return compile_unet(self.model.unet, most_graphs=most_graphs, cuda_graphs=cuda_graphs, tell=tell)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> None:
        """Let a word of the prompts stand for a textual inversion; see `checkpoints.textual_inversion`.

        Args:
            path: .pt, .bin or .safetensors.
            token: the word; by default the file's stem, and the token that the file itself names.

        Raises:
            UserError: another kind of file, vectors of another width, or a word that is there already.
        """
        m = self.model
        second = m.text_encoder_2 and (m.text_encoder_2, m.tokenizer_2)
        load_textual_inversion(path, m.text_encoder, m.tokenizer, second=second, name=token or "")

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA or MotionLoRA; returns its name, by which `model.loras.set_scale(name, scale)` changes it.

        Raises:
            UserError: another kind of file, layers that this model does not have, or a name that is there already.
        """
        return self.model.add_lora(path, scale, name)

    def save(self, folder: str | Path) -> Path:
        """Write the networks as one checkpoint per kind of file, and a config that names them; returns the folder.

        Raises:
            UserError: the folder cannot be written to.
        """
        self._check_whole("saved")
        from animatediff.pipeline.save import save_model  # reads the export tables, which no call needs

        return save_model(self.model, Path(folder), self.request)

    def _check_whole(self, what: str) -> None:
        m = self.model.memory
        if m.offload != "none" or m.weights:
            how = f"offload={m.offload}" if m.offload != "none" else f"weights_dtype={m.weights}"
            raise UserError(f"got networks that were loaded with {how}, which cannot be {what}: load them without")

    # ---- clips ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Any = None,
        num_videos_per_prompt: int = 1,
        eta: float | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        decode_chunk_size: int | None = None,
        **options: Unpack[CallOptions],
    ) -> AnimateDiffOutput | tuple[Any]:
        """Animate prompts; arguments, defaults and layouts are those of diffusers' AnimateDiffPipeline.

        Args: see docs/call.md. `options` are all other options of a request, flat or in groups, such as
            `windows="open"`, `motion_scale=0.5`, `video=…` or `freeinit={"iterations": 2}`.

        Raises:
            UserError: an argument is unknown or out of range, or two do not fit together.
        """
        call = CallArguments(num_videos_per_prompt, output_type, decode_chunk_size, callback_on_step_end)
        call.take(options)
        embeds = with_pooled(self.model, prompt_embeds, call.pooled, name="prompt_embeds")
        negatives = with_pooled(self.model, negative_prompt_embeds, call.negative_pooled, name="negative_prompt_embeds")
        given = dict(
            prompt=prompt, num_frames=num_frames, height=height, width=width, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, negative_prompt=negative_prompt, eta=eta,
        )  # fmt: skip
        request = self.request_for({**given, **options}, embeds=embeds, negatives=negatives)
        check_call(request, output_type, generator)
        with loras_scaled(self.model.loras, call.lora_scale):
            x = self.sample(
                request, videos=num_videos_per_prompt, generator=generator, latents=latents,
                prompt_embeds=embeds, negative_prompt_embeds=negatives,
                callback=call.after_step(self),
            )  # fmt: skip
        chunk = decode_chunk_size or request.memory.vae_frames
        if not request.finish.changes:
            frames = decode(self.vae, x, output_type, chunk_frames=chunk)
        else:
            video = as_bytes(decode_pixels(self.vae, x, chunk_frames=chunk))
            with loras_scaled(self.model.loras, call.lora_scale):
                video = self.finish(
                    video, request, videos=num_videos_per_prompt, generator=generator, prompt_embeds=embeds,
                    negative_prompt_embeds=negatives,
                )  # fmt: skip
            frames = as_output(video.float() / 255, output_type)
        return AnimateDiffOutput(frames) if return_dict else (frames,)

    def request_for(
        self, options: dict[str, Any], *, embeds: Context | None = None, negatives: Context | None = None
    ) -> Request:
        """The request of a call with these options, nothing left open; raises as `__call__` does."""
        options = dict(options)
        if (sigmas := options.pop("sigmas", None)) is not None:
            if options.get("timesteps") is not None:
                raise UserError("got both timesteps and sigmas, expected one of them")
            schedule = NoiseSchedule(self.model.schedule)
            levels = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
            if not isinstance(levels, (list, tuple)) or not all(type(s) in (int, float) and s >= 0 for s in levels):
                raise UserError(f"sigmas: got {describe(sigmas)}, expected a list of numbers, 0 or more")
            options["timesteps"] = schedule.timesteps_of([float(s) for s in levels if s]).tolist()
        if (options.get("prompt") is None) == (embeds is None):
            raise UserError("got both or neither of prompt and prompt_embeds, expected one of them")
        if options.get("negative_prompt") is not None and negatives is not None:
            raise UserError("got both negative_prompt and negative_prompt_embeds, expected one of them")
        m = self.model
        request = updated(
            self.request, options, motion=m.unet.config.motion is not None, loras=tuple(m.lora_roles.values()),
            sparsectrl="sparsectrl" in m.networks, embeds=embeds is not None,
        )  # fmt: skip
        check_networks(request, self.request)
        refuse_tags(request)
        return resolve(request, facts_of(m), steps=CALL_STEPS)

    @torch.no_grad()
    def sample(
        self,
        request: Request,
        *,
        videos: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Context | None = None,
        negative_prompt_embeds: Context | None = None,
        callback: Callable[[int, int, Tensor], None] | None = None,
        estimated: Callable[[Tensor], None] | None = None,
        features: Sequence[Feature] | None = None,
        video_latents: Tensor | None = None,
        spread: Spread = in_turn,
    ) -> Tensor:
        """Clean latents (b v, f, c, h, w) of a resolved request: b prompts, v videos of each.

        Args:
            generator: where the noise comes from; by default the request's seeds.
            latents: start noise (b v, c, f, h, w), instead of drawing it.
            prompt_embeds, negative_prompt_embeds: as of `encode_prompts`.
            callback: called after every step with its number, its timestep and the latents, which it may change.
            estimated: called with every estimate of the clean latents (b v, f, c, h, w), for previews.
            features: in place of the pipeline's.
            video_latents: (b v, f, c, h, w), in place of those that the VAE makes of the inputs' video.
            spread: computes the windows of a step, or the parts of its guidance, here or with other processes.
        """
        m, size, r = self.model, request.size, request
        apply_memory(m, r.memory)
        context, negative = encode_prompts(
            m, r, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, videos=videos
        )
        clips = len(context)
        inputs = prepare_inputs(
            r.inputs, frames=size.num_frames, height=size.height, width=size.width,
            window=chain_window(max_frames(m)), clips=clips,
        )  # fmt: skip
        shows = None
        if r.inputs.inversion:
            said = Prompts(prompt=(r.inputs.inversion_prompt,) * clips)  # type: ignore[call-arg]
            plain = replace(
                r, prompts=said, sampling=replace(r.sampling, guidance_scale=1.0, seed=(0,), random_seed=())
            )
            shows, _ = encode_prompts(m, plain)
        generators = generators_of(generator, r, clips, videos)
        features = features or self.features
        sampler = ClipSampler(
            m,
            r,
            context,
            negative,
            generators,
            inputs,
            shows,
            callback,
            estimated,
            features,
            video_latents,
            spread=spread,
        )
        if latents is None:
            return sampler.sample(sampler.draw(size.num_frames))
        side = m.vae.config.downsampling
        shape = (clips, m.vae.config.latent_channels, size.num_frames, size.height // side, size.width // side)
        return sampler.sample(given_latents(latents, shape).to(m.device))

    @torch.no_grad()
    def finish(
        self,
        video: Tensor,
        request: Request,
        *,
        finisher: Finisher | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Clips made larger and smoother as the request's `finish` says, uint8 (b, f, 3, H, W).

        Args:
            video: uint8 (b, f, 3, H, W).
            request: what made them, nothing left open.
            finisher: of the request, with its models loaded.
            sampling: keyword arguments of `sample`, for the second pass.
        """

        def resample(second: Request, features: tuple[Feature, ...], small: Tensor | None) -> Tensor:
            apply_memory(self.model, second.memory)
            size = (second.size.height // downsampling, second.size.width // downsampling)
            start = None if small is None else enlarged_latents(self.vae, small.to(self.device), size)
            latents = self.sample(
                resolve(second, facts_of(self.model)),
                features=features + self.features,
                video_latents=start,
                **sampling,
            )
            return as_bytes(decode_pixels(self.vae, latents, chunk_frames=request.memory.vae_frames))

        downsampling = self.vae.config.downsampling
        finisher = finisher or Finisher(request.finish, device=self.device, downsampling=downsampling)
        return finisher(video, request, resample)

    def infer(
        self,
        prompt: Any,
        video_length: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Any = None,
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
        options = {"num_inference_steps": num_inference_steps, "num_frames": video_length}
        steps = count_steps(self.request_for({"prompt": prompt, **options}), longest=max_frames(self.model))
        with tqdm(total=steps, disable=not show_progress, desc="animating", unit="step") as bar:
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

    @torch.no_grad()
    def decode_frames(self, latents: Tensor, *, chunk: int = 8) -> Iterator[np.ndarray]:
        """The frames of one clip, uint8 (H, W, 3), one after the other: only `chunk` of them are there at a time.

        Args:
            latents: (1, c, f, h, w), as the output type "latent" gives them.
        """
        yield from decode_frames(self.vae, rearrange(latents, "b c f h w -> b f c h w"), chunk=chunk)


AnimateDiff = AnimateDiffPipeline  # mmagic's name
