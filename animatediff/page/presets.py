"""Requests that fill the form: the shipped examples, and what a clip remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from animatediff.config.prompt_yaml import config_from
from animatediff.config.request import Request
from animatediff.media.video import read_metadata
from animatediff.pipeline.run_folder import settings_request
from animatediff.utils import UserError

EXAMPLE_CLIPS = (  # label, config, entry, prompt
    ("Bounce", "animate/shapes.yaml", 0, 8),
    ("Travel", "animate/travel.yaml", 0, 0),
    ("Loop", "animate/loop.yaml", 2, 0),
    ("Neon style", "animate/shapes-styles.yaml", 0, 0),
    ("MotionLoRA", "animate/shapes-motion-lora.yaml", 0, 0),
    ("From a clip", "animate/vid2vid.yaml", 0, 0),
)


def one_prompt(request: Request, place: int = 0) -> Request:
    """The request of one of its prompts alone."""
    prompts, sampling = request.prompts, request.sampling
    (prompt, negative, seed) = request.per_prompt()[place]
    negatives = (negative,) if prompts.negative_prompt else ()
    prompts = replace(prompts, prompt=(prompt,), negative_prompt=negatives, head_prompt="", tail_prompt="")
    return replace(request, prompts=prompts, sampling=replace(sampling, seed=(seed,), random_seed=()))


def read_settings(path: str | Path, name: str = "") -> Request:
    """The request that made a clip, as the clip remembers it; `name` is what messages call it.

    Raises:
        UserError: it remembers nothing, or is no clip.
    """
    settings, name = read_metadata(path), name or Path(path).name
    if not {"prompt", "prompts"} & settings.keys():
        raise UserError(f"got {name}, which holds no settings, expected a clip made here")
    (entry,) = config_from([settings_request(settings)], name, name=name).entries
    return entry
