"""What a call of the pipeline says beside its request, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from animatediff.config.request import Inputs, Model, Output, Prompts, Request, Sampling, Size
from animatediff.config.spellings import called
from animatediff.features.noise import draw_seed, seeded
from animatediff.pipeline.outputs import OUTPUT_TYPES
from animatediff.utils import UserError, describe

if TYPE_CHECKING:
    from animatediff.pipeline.pipeline import AnimateDiffPipeline

# what a pipeline reads its networks from, once
OF_FILES = (*(f"model.{f.name}" for f in fields(Model)), "sparsectrl.path", "sparsectrl.config")

Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[["AnimateDiffPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class AnimateDiffOutput:
    """The clips; `videos` is the official pipeline's name for them. `out[0]` and `out["frames"]` are the same."""

    frames: Any

    @property
    def videos(self) -> Any:
        return self.frames

    def __getitem__(self, key: int | str) -> Any:
        return (self.frames,)[key] if isinstance(key, int) else getattr(self, key)


@dataclass
class CallArguments:
    """What a call says beside its request."""

    videos: int
    output_type: str
    chunk: int | None
    callback: StepCallback | None
    lora_scale: float = 1.0
    pooled: Tensor | None = None
    negative_pooled: Tensor | None = None

    def take(self, options: dict[str, Any]) -> None:
        """Take what is no option of a request out of the call's keywords; check the rest of the call.

        Raises:
            UserError: a value out of range.
        """
        wanted = options.pop("callback_on_step_end_tensor_inputs", None) or ["latents"]
        if list(wanted) != ["latents"]:
            raise UserError(f"callback_on_step_end_tensor_inputs: got {wanted!r}, expected ['latents']")
        attention = options.pop("cross_attention_kwargs", None) or {}
        if set(attention) - {"scale"}:
            raise UserError(f"cross_attention_kwargs: got {sorted(attention)}, expected scale, a factor of all LoRAs")
        self.lora_scale = attention.get("scale", 1.0)
        self.pooled = options.pop("pooled_prompt_embeds", None)
        self.negative_pooled = options.pop("negative_pooled_prompt_embeds", None)
        chunk = 1 if self.chunk is None else self.chunk
        for name, value in (("num_videos_per_prompt", self.videos), ("decode_chunk_size", chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: got {describe(value)}, expected at least 1")
        if self.callback is not None and not callable(self.callback):
            raise UserError(f"callback_on_step_end: got {describe(self.callback)}, expected a function")
        if self.output_type not in OUTPUT_TYPES:
            raise UserError(f"got output_type {self.output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")

    def after_step(self, pipeline: AnimateDiffPipeline) -> Callable[[int, int, Tensor], None] | None:
        """The sampler's callback that calls the user's, with steps counted over all iterations and windows."""
        if self.callback is None:
            return None
        callback, done = self.callback, 0

        def after_step(step: int, timestep: int, x: Tensor) -> None:
            nonlocal done
            seen = rearrange(x, "b f c h w -> b c f h w")
            wanted = (callback(pipeline, done, timestep, {"latents": seen}) or {}).get("latents", seen)
            done += 1
            if wanted is not seen:
                x.copy_(given_latents(wanted, tuple(seen.shape)))

        return after_step


def defaults_for_calls(entry: Request) -> Request:
    """What of a config's entry holds for calls of its pipeline."""
    p, s, c = entry.prompts, entry.sampling, entry.sparsectrl
    return replace(
        entry,
        prompts=Prompts(weighting=p.weighting, clip_skip=p.clip_skip),  # type: ignore[call-arg]
        size=Size(height=entry.size.height, width=entry.size.width),  # type: ignore[call-arg]
        sampling=Sampling(sampler=s.sampler, timestep_spacing=s.timestep_spacing),  # type: ignore[call-arg]
        inputs=Inputs(),
        sparsectrl=replace(c, images=(), frames=(0,), scale=(1.0,)),
        finish=replace(entry.finish, audio=""),
        output=Output(),
        spelled={},
    )


def check_networks(request: Request, loaded: Request) -> None:
    """Raises: UserError where a call names other files than its pipeline was loaded from."""
    for option in OF_FILES:
        group, name = option.split(".")
        got, had = (getattr(getattr(r, group), name) for r in (request, loaded))
        if got != had:
            raise UserError(
                f"{called(request, option)}: got {describe(got)}, but the networks are loaded already: give it to "
                "from_config; load_lora and load_textual_inversion add to them"
            )


def advance(bar: tqdm) -> StepCallback:
    """A `callback_on_step_end` that moves a progress bar."""

    def after_step(*_: Any) -> None:
        bar.update()

    return after_step


def generators_of(generator: Generators, request: Request, clips: int, videos: int) -> list[torch.Generator]:
    """One for each clip: the caller's, or of the request's seeds; -1 draws one seed, from which all clips draw."""
    if isinstance(generator, torch.Generator):
        return [generator] * clips
    if generator is not None:
        if not isinstance(generator, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generator):
            raise UserError(f"generator: got {describe(generator)}, expected a torch.Generator, or one for each clip")
        if len(generator) != clips:
            raise UserError(f"got {len(generator)} generators for {clips} clips, expected one, or one for each clip")
        return list(generator)
    seeds = request.sampling.random_seed or request.sampling.seed
    if set(seeds) == {-1}:
        return [seeded(draw_seed())] * clips
    seeds = seeds * (clips // videos) if len(seeds) == 1 else seeds
    streams = [seeded(draw_seed() if seed == -1 else seed) for seed in seeds]
    return [stream for stream in streams for _ in range(videos)]


def given_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents of a caller, (b, c, f, h, w), in the order used inside."""
    if not isinstance(latents, Tensor):
        raise UserError(f"latents: got {describe(latents)}, expected a tensor of shape {shape} (clips, c, f, h, w)")
    if tuple(latents.shape) != shape:
        raise UserError(f"got latents of shape {tuple(latents.shape)}, expected {shape} (clips, c, f, h, w)")
    return rearrange(latents.float(), "b c f h w -> b f c h w")


def check_call(request: Request, output_type: str, generator: Generators) -> None:
    """Raises: UserError where a call cannot do what its request says."""
    if generator is not None and "sampling.seed" in request.spelled:
        raise UserError("got both generator and seed, expected one of them")
    if "memory.batch_size" in request.spelled:
        raise UserError("batch_size is of runs: a call samples all its prompts together: leave it out")
    if request.finish.changes and output_type == "latent":
        raise UserError("got finish for the output type latent, expected pixels: choose another, or leave finish out")
    if request.finish.audio:
        raise UserError("finish.audio is of files: leave it out, and give a sound to animatediff.media's save_video")
