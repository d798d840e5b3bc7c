"""Requests that fill the form: the shipped examples, and what a clip remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from animatediff.config.prompt_yaml import config_from
from animatediff.config.request import Request
from animatediff.page.places import Places
from animatediff.pipeline.remembered import load_run, read_remembered
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


def read_settings(path: Path, places: Places, name: str = "") -> tuple[Request, list[str]]:
    """The request in a clip of ours, or in a picture or clip of AUTOMATIC1111 or ComfyUI; and what is to be said of it.

    Files that were moved are found by their hashes; where some are nowhere, or not among those of the page, the request
    names them as the clip does, or not at all.

    Args:
        name: what messages call the clip.

    Raises:
        UserError: it remembers nothing.
    """
    name = name or path.name
    try:
        known = read_remembered(path)
        try:
            if known.foreign is None:
                places.check(known.request())  # before any file that it names is looked at
            config, notes = load_run(path)
        except UserError as error:
            config, notes = config_from([known.values], name, name=name), [str(error)]
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    return config.entries[0], [note.replace(str(path), name) for note in notes]
