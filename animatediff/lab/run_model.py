"""A configured model as a function of captions, for `evaluate_shapes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from animatediff.config.request import Request
from animatediff.config.spellings import files
from animatediff.features.noise import seeded
from animatediff.media.scribble import draw_scribbles
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from animatediff.world.evaluate import Generate
from animatediff.world.series import World
from animatediff.world.shapes import FRAMES, SIZE

PICTURED = ("controlnets.nets", "ip_adapters.adapters")  # options whose pictures are drawn from the scenes
PICTURE_FRAME = FRAMES // 2  # of a scene, which an IP-Adapter sees


def check_entry(entry: Request) -> None:
    """Raises: UserError where an entry makes clips of something else than captions, or not of the world's size."""
    name, size = entry.output.name, entry.size
    given = [
        file.called
        for option, file in files(entry).items()
        if option.startswith(("inputs.", "sparsectrl.images")) or (".images" in option and option.startswith(PICTURED))
    ]
    if given:
        raise UserError(f"entry {name}: got {given[0]}, expected none: clips are made from captions alone")
    if (size.num_frames, size.height, size.width) != (FRAMES, SIZE, SIZE):
        raise UserError(
            f"entry {name}: got L={size.num_frames} H={size.height} W={size.width}, expected L={FRAMES} H={SIZE} "
            f"W={SIZE}, as the clips of Shapes, the toy data set: measure other clips by --videos"
        )


def clip_maker(pipeline: AnimateDiffPipeline, entry: Request) -> Callable[..., Tensor]:
    """What animates captions as an entry of a prompt config says.

    Args:
        pipeline: of that entry.
        entry: its prompts and seeds are not used, but what is to be before and after every prompt, and avoided.

    Returns:
        Of captions and noise seeds, and further keywords of the pipeline's call.

    Raises:
        UserError: the entry asks for what cannot be, or `check_entry` refuses it.
    """
    check_entry(entry)
    (checked,) = check_requests([entry], complete=False)
    sampling, prompts = checked.request.sampling, entry.prompts

    def generate(captions: list[str], seeds: list[int], **more: Any) -> Tensor:
        said = replace(prompts, prompt=tuple(captions), negative_prompt=prompts.negative_prompt[:1])
        framed = replace(entry, prompts=said, sampling=replace(entry.sampling, seed=(0,), random_seed=()))
        clips = pipeline(
            [prompt for prompt, _, _ in framed.per_prompt()],
            num_frames=entry.size.num_frames,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            eta=sampling.eta,
            sampler=sampling.sampler,
            timestep_spacing=sampling.timestep_spacing,
            timesteps=sampling.timesteps or None,
            negative_prompt=prompts.negative_prompt[:1] or None,
            generator=[seeded(seed) for seed in seeds],
            output_type="pt",
            **more,
        )
        return clips.frames * 2 - 1

    return generate


def pictured_clip_maker(pipeline: AnimateDiffPipeline, entry: Request, world: World) -> Generate:
    """The same for an entry with ControlNets or IP-Adapters, which get pictures of the scenes of the captions.

    ControlNets see the lines of every frame, IP-Adapters the middle frame; of both the entry names no pictures.

    Args:
        world: whose scene i has the noise seed i.

    Raises:
        UserError: as `clip_maker`.
    """
    make = clip_maker(pipeline, entry)
    nets, adapters = len(entry.controlnets.nets), len(entry.ip_adapters.adapters)
    if not nets and not adapters:
        return make

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        clips = []
        for caption, seed in zip(captions, seeds, strict=True):
            frames = world.render([seed])[0][0]
            lines = draw_scribbles(frames)[:, None].expand_as(frames).float()
            pictures: dict[str, Any] = {"controlnet": [{"images": lines}] * nets} if nets else {}
            if adapters:
                picture = frames[PICTURE_FRAME : PICTURE_FRAME + 1] / 2 + 0.5
                pictures["ip_adapter"] = [{"images": picture}] * adapters
            clips.append(make([caption], [seed], **pictures))
        return torch.cat(clips)

    return generate


def controlled_clip_maker(
    pipeline: AnimateDiffPipeline, entry: Request, world: World, given: Sequence[int]
) -> Generate:
    """The same for a pipeline with a SparseCtrl encoder, which sees frames of the scenes that the captions describe.

    Args:
        world: whose scene i has the noise seed i; of its frames, an encoder for scribbles sees the lines.
        given: numbers of the frames.

    Raises:
        UserError: as above, or no encoder is there.
    """
    make = clip_maker(pipeline, entry)
    encoder = pipeline.model.sparsectrl
    if encoder is None:
        raise UserError("got frames that are given without a SparseCtrl encoder, expected one: set controlnet_path")

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        clips = []
        for caption, seed in zip(captions, seeds, strict=True):
            frames = world.render([seed])[0][0, list(given)]
            if encoder.config.kind == "scribble":
                pictures = draw_scribbles(frames)[:, None].expand_as(frames).float()
            else:
                pictures = frames / 2 + 0.5
            clips.append(make([caption], [seed], conditioning_frames=pictures, controlnet_frame_indices=given))
        return torch.cat(clips)

    return generate
