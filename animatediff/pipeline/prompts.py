"""Prompts and negative prompts to the contexts that the network is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff.config.request import Prompts, Request
from animatediff.features.prompt_travel import Context, join, travel_context
from animatediff.models.prompt_weighting import parse_prompt
from animatediff.models.text import equally_long
from animatediff.pipeline.model import Model
from animatediff.utils import UserError

Clip = tuple[list[int], Tensor]  # keyframes and their embeddings (k, l, d)


def encode_prompts(
    model: Model,
    request: Request,
    *,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    videos: int = 1,
) -> tuple[Context, Context | None]:
    """The contexts of b prompts and, where guidance needs them, of as many negative prompts, alike in kind and size.

    Args:
        request: nothing left open.
        prompt_embeds: (b, l, d), instead of the request's prompts.
        negative_prompt_embeds: (b, l, d), instead of its negative prompts; else these are encoded to l tokens.
        videos: clips of every prompt, one after the other.

    Raises:
        UserError: embeddings do not fit together.
    """
    guided = request.sampling.guidance_scale > 1
    if prompt_embeds is None:
        every = request.per_prompt()
        prompts = [prompt for prompt, *_ in every]
        negatives = [negative for _, negative, _ in every]
    else:
        prompts = []
        negatives = list(request.prompts.negative_prompt) or [""]
        negatives = negatives * len(prompt_embeds) if len(negatives) == 1 else negatives
    negatives = negatives if guided and negative_prompt_embeds is None else []
    sides = [side for side in (prompts, negatives) if side]
    clips = embed(model, list(zip(*sides, strict=True)), request.prompts)
    positive = [clip[0] for clip in clips] if prompt_embeds is None else _constant(prompt_embeds)
    negative = [clip[-1] for clip in clips] if negative_prompt_embeds is None else _constant(negative_prompt_embeds)
    negative = negative if guided else []
    if prompt_embeds is not None and negative_prompt_embeds is None and negative:
        negative = [(keys, _of_length(states, prompt_embeds.shape[1])) for keys, states in negative]
    if (
        negative
        and not (prompt_embeds is None and negative_prompt_embeds is None)
        and _shape(negative) != _shape(positive)
    ):
        shapes = [_shape(side) for side in (positive, negative)]
        raise UserError(
            f"got text embeddings {shapes[0]} and negative ones {shapes[1]}, expected equal shapes: encode both with "
            "as many tokens"
        )
    travels, like = any(len(keys) > 1 for keys, _ in positive + negative), positive[0][1]
    longer = equally_long([states for _, states in positive + negative])
    both = [(keys, states) for (keys, _), states in zip(positive + negative, longer, strict=True)]
    positive, negative = both[: len(positive)], both[len(positive) :]

    def context(side: list[Clip]) -> Context:
        repeated = [(keys, states.to(like)) for keys, states in side for _ in range(videos)]
        if not travels:
            return torch.cat([states for _, states in repeated])
        frames = request.size.num_frames
        mixed = [travel_context(request.travel, states, keys, frames, loop=request.loops) for keys, states in repeated]
        return join(mixed)

    return context(positive), context(negative) if negative else None


def first_text(prompt: str | dict[int, str]) -> str:
    """What a prompt says at its beginning."""
    return prompt if isinstance(prompt, str) else prompt[min(prompt)]


def embed(model: Model, clips: Sequence[Sequence[str | dict[int, str]]], options: Prompts) -> list[list[Clip]]:
    """The embeddings (k, l, d) of prompts, those of one clip (its prompt, its negative prompt) of one length.

    A clip's length does not depend on the others, so that neither does the clip. What is equally long is encoded
    together, prompts before negative prompts.
    """
    longest = model.text_encoder.config.max_length
    rows: list[tuple[int, int, int, Tensor, Tensor | None]] = []  # place of the prompt, clip, keyframe, ids, weights
    keyframes = [[{0: prompt} if isinstance(prompt, str) else prompt for prompt in clip] for clip in clips]
    for c, prompts in enumerate(keyframes):
        texts = [text for keys in prompts for text in keys.values()]
        if options.weighting:
            ids, weights = model.tokenizer.weighted([parse_prompt(text) for text in texts], max_length=longest)
        else:
            ids, weights = model.tokenizer(texts, max_length=longest), None
        places = [(place, key) for place, keys in enumerate(prompts) for key in keys]
        for i, (place, key) in enumerate(places):
            rows.append((place, c, key, ids[i], None if weights is None else weights[i]))
    rows.sort(key=lambda row: row[0])
    states: dict[tuple[int, int, int], Tensor] = {}
    for chunks in dict.fromkeys(len(row[3]) for row in rows):
        same = [row for row in rows if len(row[3]) == chunks]
        weights = torch.stack([row[4] for row in same]).to(model.device) if options.weighting else None  # type: ignore[misc]
        ids = torch.stack([row[3] for row in same]).to(model.device)
        encoded = model.text_encoder.encode(ids, weights=weights, clip_skip=options.clip_skip)
        states |= {row[:3]: state for row, state in zip(same, encoded, strict=True)}
    return [
        [(list(keys), torch.stack([states[place, c, key] for key in keys])) for place, keys in enumerate(prompts)]
        for c, prompts in enumerate(keyframes)
    ]


def _constant(embeds: Tensor) -> list[Clip]:
    """Embeddings of a caller, (b, l, d), each for all frames."""
    return [([0], row) for row in embeds.split(1)]


def _shape(side: list[Clip]) -> tuple[int, ...]:
    return (len(side), *side[0][1].shape[1:])


def _of_length(states: Tensor, length: int) -> Tensor:
    """Embeddings (k, l, d) cut to `length` tokens, or with the last one, which is padding, repeated."""
    missing = length - states.shape[1]
    return states[:, :length] if missing <= 0 else torch.cat([states, states[:, -1:].expand(-1, missing, -1)], dim=1)
