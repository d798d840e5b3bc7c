"""Prompts and negative prompts to the contexts that the network is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff.config.request import Prompts, Request
from animatediff.features.prompt_travel import Context, join, travel_context
from animatediff.models.prompt_weighting import parse_prompt
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
    count = len(prompts) if prompt_embeds is None else len(prompt_embeds)
    negatives = negatives if guided and negative_prompt_embeds is None else []
    # Together, so that prompts and negative prompts come out equally long.
    clips = embed(model, [*prompts, *negatives], request.prompts)
    positive = clips[: len(prompts)] if prompt_embeds is None else _constant(prompt_embeds)
    negative = clips[len(prompts) :] if negative_prompt_embeds is None else _constant(negative_prompt_embeds)
    if prompt_embeds is not None and negative_prompt_embeds is None and negative:
        negative = [(keys, _of_length(states, prompt_embeds.shape[1])) for keys, states in negative]
    negative = negative if guided else []
    if negative and (len(negative), *negative[0][1].shape[1:]) != (count, *positive[0][1].shape[1:]):
        shapes = [(len(side), *side[0][1].shape[1:]) for side in (positive, negative)]
        raise UserError(
            f"got text embeddings {shapes[0]} and negative ones {shapes[1]}, expected equal shapes: encode both with "
            "as many tokens"
        )
    travels, like = any(len(keys) > 1 for keys, _ in positive + negative), positive[0][1]

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


def embed(model: Model, prompts: Sequence[str | dict[int, str]], options: Prompts) -> list[Clip]:
    """Every prompt's embeddings (k, l, d), all of one length."""
    keyframes = [{0: prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = [text for keys in keyframes for text in keys.values()]
    if not texts:
        return []
    longest, weights = model.text_encoder.config.max_length, None
    if options.weighting:
        ids, weights = model.tokenizer.weighted([parse_prompt(text) for text in texts], max_length=longest)
        weights = weights.to(model.device)
    else:
        ids = model.tokenizer(texts, max_length=longest)
    states = model.text_encoder.encode(ids.to(model.device), weights=weights, clip_skip=options.clip_skip)
    parts = states.split([len(keys) for keys in keyframes])
    return [(list(keys), part) for keys, part in zip(keyframes, parts, strict=True)]


def _constant(embeds: Tensor) -> list[Clip]:
    """Embeddings of a caller, (b, l, d), each for all frames."""
    return [([0], row) for row in embeds.split(1)]


def _of_length(states: Tensor, length: int) -> Tensor:
    """Embeddings (k, l, d) cut to `length` tokens, or with the last one, which is padding, repeated."""
    missing = length - states.shape[1]
    return states[:, :length] if missing <= 0 else torch.cat([states, states[:, -1:].expand(-1, missing, -1)], dim=1)
