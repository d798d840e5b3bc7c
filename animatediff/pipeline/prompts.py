"""Prompts and negative prompts to the contexts that the network is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from animatediff.config.prompt_yaml import Prompt, check_keyframes
from animatediff.features.prompt_travel import Context, Travel, join
from animatediff.models.prompt_weighting import parse_prompt
from animatediff.pipeline.model import Components
from animatediff.utils import UserError

Prompts = Prompt | Sequence[Prompt] | None
Clip = tuple[list[int], Tensor]  # keyframes and their embeddings (k, l, d)


def encode_prompts(
    components: Components,
    prompt: Prompts,
    negative_prompt: Prompts,
    embeds: Tensor | None = None,
    negative_embeds: Tensor | None = None,
    *,
    guided: bool,
    num_frames: int,
    videos: int = 1,
    loop: bool = False,
    travel: Travel | None = None,
    prompt_weighting: bool | None = None,
    clip_skip: int | None = None,
) -> tuple[Context, Context | None]:
    """The contexts of b prompts and, where guidance needs them, of as many negative prompts, alike in kind and size.

    Args:
        prompt: one or several, each a text or keyframes {frame: text}.
        negative_prompt: one for all prompts, or one for each.
        embeds: (b, l, d), instead of `prompt`.
        negative_embeds: (b, l, d), instead of `negative_prompt`.
        videos: clips of every prompt, one after the other.
        loop: whether the clips do, where `travel` does not say.
        travel: between keyframes; by default the config's, as of the next two.
        prompt_weighting: read brackets and BREAK, see `prompt_weighting.parse_prompt`.
        clip_skip: as of `TextEncoder.forward`.

    Raises:
        UserError: two arguments do not fit together, or a keyframe is outside the clip.
    """
    if (prompt is None) == (embeds is None):
        raise UserError("got both or neither of prompt and prompt_embeds, expected one of them")
    if negative_prompt is not None and negative_embeds is not None:
        raise UserError("got both negative_prompt and negative_prompt_embeds, expected one of them")
    prompts = _listed(prompt)
    count = len(prompts) if embeds is None else len(embeds)
    if not count:
        raise UserError("prompt: got an empty list, expected at least one prompt")
    negatives = _listed(negative_prompt) or [""]
    negatives = negatives * count if len(negatives) == 1 else negatives
    if len(negatives) != count:
        raise UserError(f"got {len(negatives)} negative prompts for {count} prompts, expected one, or one for each")
    negatives = negatives if guided and negative_embeds is None else []
    # Together, so that prompts and negative prompts come out equally long.
    clips = _embed(
        components,
        [_keyframes(p, num_frames) for p in prompts + negatives],
        weighting=components.prompt_weighting if prompt_weighting is None else prompt_weighting,
        clip_skip=components.clip_skip if clip_skip is None else clip_skip,
    )
    positive = clips[: len(prompts)] if embeds is None else _held(embeds)
    negative = clips[len(prompts) :] if negative_embeds is None else _held(negative_embeds) if guided else []
    if negative and (len(negative), *negative[0][1].shape[1:]) != (count, *positive[0][1].shape[1:]):
        shapes = [(len(side), *side[0][1].shape[1:]) for side in (positive, negative)]
        raise UserError(
            f"got text embeddings {shapes[0]} and negative ones {shapes[1]}, expected equal shapes: encode both with "
            "as many tokens"
        )
    mix = partial((travel or components.travel).mix, frames=num_frames, loop=loop)
    travels, like = any(len(keys) > 1 for keys, _ in positive + negative), positive[0][1]

    def context(side: list[Clip]) -> Context:
        clips = [(keys, states.to(like)) for keys, states in side for _ in range(videos)]
        return join([mix(states, keys) for keys, states in clips]) if travels else torch.cat([e for _, e in clips])

    return context(positive), context(negative) if negative else None


def first_text(prompt: Prompt) -> str:
    """What a prompt says at its beginning."""
    return prompt if isinstance(prompt, str) else prompt[min(prompt)]


def _listed(prompts: Prompts) -> list[Prompt]:
    if prompts is None:
        return []
    return [prompts] if isinstance(prompts, str | Mapping) else list(prompts)


def _keyframes(prompt: Prompt, frames: int) -> dict[int, str]:
    """Frame -> text, in order."""
    if not isinstance(prompt, Mapping):
        return {0: prompt}
    if wrong := [frame for frame in prompt if not isinstance(frame, int)]:
        raise UserError(f"prompt: got a keyframe at {wrong[0]!r}, expected the number of a frame, such as 0")
    check_keyframes("prompt", prompt, frames)
    return dict(sorted(prompt.items()))


def _embed(c: Components, keyframes: Sequence[dict[int, str]], *, weighting: bool, clip_skip: int) -> list[Clip]:
    """Every prompt's embeddings (k, l, d), all of one length."""
    texts = [text for keys in keyframes for text in keys.values()]
    if not texts:
        return []
    longest, weights = c.text_encoder.config.max_length, None
    if weighting:
        ids, weights = c.tokenizer.weighted([parse_prompt(text) for text in texts], max_length=longest)
        weights = weights.to(c.device)
    else:
        ids = c.tokenizer(texts, max_length=longest)
    states = c.text_encoder.encode(ids.to(c.device), weights=weights, clip_skip=clip_skip)
    parts = states.split([len(keys) for keys in keyframes])
    return [(list(keys), part) for keys, part in zip(keyframes, parts, strict=True)]


def _held(embeds: Tensor) -> list[Clip]:
    """Embeddings of a caller, (b, l, d), each for all frames."""
    return [([0], row) for row in embeds.split(1)]
