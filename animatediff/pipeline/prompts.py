"""Prompts and negative prompts to the contexts that the network is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff.config.request import Prompts, Request
from animatediff.features.prompt_travel import Context, FrameContext, PooledContext, join, travel_context
from animatediff.models.prompt_weighting import parse_prompt
from animatediff.models.text import TextEncoder, equally_long
from animatediff.models.tokenizer import Tokenizer
from animatediff.pipeline.model import Model
from animatediff.utils import UserError, describe

# One prompt: its keyframes, and their embeddings: tokens (k, l, d) and, for SDXL, pooled vectors (k, 1, p).
Clip = tuple[list[int], tuple[Tensor, ...]]
Tokens = tuple[Tensor, Tensor | None]  # ids and, where brackets count, the weight of each


def encode_prompts(
    model: Model,
    request: Request,
    *,
    prompt_embeds: Context | None = None,
    negative_prompt_embeds: Context | None = None,
    videos: int = 1,
) -> tuple[Context, Context | None]:
    """The contexts of b prompts and, where guidance needs them, of as many negative prompts, alike in kind and size.

    Args:
        request: nothing left open.
        prompt_embeds: (b, l, d), for SDXL with (b, 1, p), instead of the request's prompts.
        negative_prompt_embeds: the same instead of its negative prompts; else these are encoded to l tokens.
        videos: clips of every prompt, one after the other.

    Raises:
        UserError: embeddings do not fit together.
    """
    for name, value in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if isinstance(value, PooledContext):
            value = value.tokens
        if value is not None and not (isinstance(value, Tensor) and value.ndim == 3 and len(value)):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else describe(value)
            raise UserError(f"{name}: got {got}, expected a tensor (b, l, d)")
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
    if negatives and not request.prompts.negative_prompt and model.zeros_for_no_prompt:
        negative = [(keys, tuple(map(torch.zeros_like, states))) for keys, states in negative]
    if prompt_embeds is not None and negative_prompt_embeds is None:
        length = positive[0][1][0].shape[1]
        negative = [(keys, (_of_length(tokens, length), *pooled)) for keys, (tokens, *pooled) in negative]
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
    travels = any(len(keys) > 1 for keys, _ in positive + negative)
    longer = equally_long([tokens for _, (tokens, *_) in positive + negative])
    both = [(keys, (t, *pooled)) for (keys, (_, *pooled)), t in zip(positive + negative, longer, strict=True)]
    positive, negative = both[: len(positive)], both[len(positive) :]

    def joined(side: list[Clip], kind: int) -> Tensor | FrameContext:
        like = positive[0][1][kind]
        repeated = [(keys, states[kind].to(like)) for keys, states in side for _ in range(videos)]
        if not travels:
            return torch.cat([states for _, states in repeated])
        frames = request.size.num_frames
        mixed = [travel_context(request.travel, states, keys, frames, loop=request.loops) for keys, states in repeated]
        return join(mixed)

    def context(side: list[Clip]) -> Context:
        tokens, *pooled = (joined(side, kind) for kind in range(len(side[0][1])))
        return PooledContext(tokens, *pooled) if pooled else tokens

    return context(positive), context(negative) if negative else None


def first_text(prompt: str | dict[int, str]) -> str:
    """What a prompt says at its beginning."""
    return prompt if isinstance(prompt, str) else prompt[min(prompt)]


def embed(model: Model, clips: Sequence[Sequence[str | dict[int, str]]], options: Prompts) -> list[list[Clip]]:
    """The embeddings of prompts, those of one clip (its prompt, its negative prompt) of one length.

    A clip's length does not depend on the others, so that neither does the clip. What is equally long is encoded
    together, prompts before negative prompts.
    """
    rows: list[tuple[int, int, int, list[Tokens]]] = []  # place of the prompt, clip, keyframe, of each text encoder
    keyframes = [[{0: prompt} if isinstance(prompt, str) else prompt for prompt in clip] for clip in clips]
    for c, prompts in enumerate(keyframes):
        texts = [text for keys in prompts for text in keys.values()]
        tokens = [_tokenize(*pair, texts, weighting=options.weighting) for pair in model.text_encoders()]
        places = [(place, key) for place, keys in enumerate(prompts) for key in keys]
        for i, (place, key) in enumerate(places):
            rows.append((place, c, key, [(ids[i], None if w is None else w[i]) for ids, w in tokens]))
    rows.sort(key=lambda row: row[0])
    states: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}
    for chunks in dict.fromkeys(len(row[3][0][0]) for row in rows):
        same = [row for row in rows if len(row[3][0][0]) == chunks]
        stacked = [_stack(column, model.device) for column in zip(*(row[3] for row in same), strict=True)]
        encoded = zip(*_encode(model, stacked, options), strict=True)
        states |= {row[:3]: kinds for row, kinds in zip(same, encoded, strict=True)}

    def clip(c: int, place: int, keys: dict[int, str]) -> Clip:
        kinds = zip(*(states[place, c, key] for key in keys), strict=True)
        return list(keys), tuple(torch.stack(kind) for kind in kinds)

    return [[clip(c, place, keys) for place, keys in enumerate(prompts)] for c, prompts in enumerate(keyframes)]


def _tokenize(encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str], *, weighting: bool) -> Tokens:
    """Of n texts, each (n, chunks, l)."""
    longest = encoder.config.max_length
    if not weighting:
        return tokenizer(texts, max_length=longest), None
    return tokenizer.weighted([parse_prompt(text) for text in texts], max_length=longest)


def _stack(rows: Sequence[Tokens], device: torch.device) -> Tokens:
    ids, weights = zip(*rows, strict=True)
    return torch.stack(ids).to(device), None if weights[0] is None else torch.stack(weights).to(device)


def _encode(model: Model, tokens: Sequence[Tokens], options: Prompts) -> tuple[Tensor, ...]:
    """States (n, l, d) of n texts; for SDXL of both encoders side by side, and the second's pooled vector (n, 1, p).

    SDXL takes the layer before the last, without the final norm, and pools the first chunk.
    """
    encoders = [encoder for encoder, _ in model.text_encoders()]
    sdxl = model.text_encoder_2 is not None
    how = {"clip_skip": max(options.clip_skip, 2), "final_norm": False} if sdxl else {"clip_skip": options.clip_skip}
    states = [e.encode(ids, weights=weights, **how) for e, (ids, weights) in zip(encoders, tokens, strict=True)]
    if not sdxl:
        return tuple(states)
    first = tokens[-1][0][:, 0]
    pooled = encoders[-1].pool(encoders[-1].hidden_states(first)[-1], first)
    return torch.cat(states, dim=-1), pooled[:, None]


def with_pooled(model: Model, embeds: Tensor | None, pooled: Tensor | None, *, name: str) -> Context | None:
    """Embeddings of a call (b, l, d), for SDXL with pooled vectors (b, p), as a context.

    Raises:
        UserError: one without the other, or pooled vectors for SD 1.x.
    """
    if embeds is None and pooled is None:
        return None
    if embeds is None or (pooled is None) == bool(model.text_encoder_2):
        needed = f"both {name} and its pooled vectors" if model.text_encoder_2 else f"{name} alone"
        raise UserError(f"{name}: got {'no pooled' if pooled is None else 'pooled'} vectors, expected {needed}")
    return embeds if pooled is None else PooledContext(embeds, pooled[:, None])


def _constant(embeds: Context) -> list[Clip]:
    """Embeddings of a caller, (b, l, d), each for all frames."""
    kinds = (embeds.tokens, embeds.pooled) if isinstance(embeds, PooledContext) else (embeds,)
    return [([0], rows) for rows in zip(*(kind.split(1) for kind in kinds), strict=True)]


def _shape(side: list[Clip]) -> tuple[int, ...]:
    return (len(side), *side[0][1][0].shape[1:])


def _of_length(states: Tensor, length: int) -> Tensor:
    """Embeddings (k, l, d) cut to `length` tokens, or with the last one, which is padding, repeated."""
    missing = length - states.shape[1]
    return states[:, :length] if missing <= 0 else torch.cat([states, states[:, -1:].expand(-1, missing, -1)], dim=1)
