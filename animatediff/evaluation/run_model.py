"""A configured model as a function of captions, for `evaluate_shapes`."""

from __future__ import annotations

from torch import Tensor

from animatediff.config import AnimateEntry
from animatediff.evaluation.run_shapes import Generate
from animatediff.pipelines.animate import AnimateDiffPipeline
from animatediff.pipelines.components import seeded
from animatediff.pipelines.weights import check_entries


def clip_maker(pipeline: AnimateDiffPipeline, entry: AnimateEntry) -> Generate:
    """What animates captions as an entry of a prompt config says: its sampler, guidance, length, negative prompt.

    Args:
        pipeline: of that entry.
        entry: its prompts and seeds are not used.

    Raises:
        UserError: the entry asks for what cannot be.
    """
    (checked,) = check_entries([entry])
    sampling = checked.sampling

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        clips = pipeline(
            captions,
            num_frames=entry.L,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            eta=sampling.eta,
            sampler=sampling.sampler,
            timestep_spacing=sampling.timestep_spacing,
            timesteps=sampling.timesteps,
            negative_prompt=entry.n_prompt[0],
            generator=[seeded(seed) for seed in seeds],
            output_type="pt",
        )
        return clips.frames * 2 - 1

    return generate
