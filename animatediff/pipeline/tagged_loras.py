"""Requests whose prompts name LoRAs, `<lora:name:0.8>`, as requests that list them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any

from animatediff.checkpoints.find_models import as_option, find_lora
from animatediff.config.lora_tags import LORA_TAG, LoRATag, take_tags
from animatediff.config.request import LoRAFile, Request
from animatediff.config.spellings import called
from animatediff.utils import UserError, naming

Prompt = str | dict[int, str]


def with_tagged_loras(requests: Iterable[Request]) -> list[Request]:
    """The same requests without tags; one whose prompts differ in their LoRAs becomes several, in the same order.

    Only where `prompts.weighting` is on; else a tag is text.

    Raises:
        UserError: no LoRA of a name, several of it, or a tag that cannot be read.
    """
    return [one for request in requests for one in (_apart(request) if request.prompts.weighting else [request])]


def refuse_tags(request: Request) -> None:
    """Raises: UserError for a tag in a prompt of a call, whose LoRAs are those of its pipeline."""
    texts = [text for prompt in request.prompts.prompt for text in _texts(prompt)] if request.prompts.weighting else []
    if tag := next((match[0] for text in texts if (match := LORA_TAG.search(text))), None):
        raise UserError(
            f"{called(request, 'prompts.prompt')}: got {tag!r:.100}, expected a prompt without LoRAs: a call has those "
            "of its pipeline, from pipe.load_lora(path, scale=…) or from_config(…, lora_model_path=…)"
        )


def _apart(request: Request) -> list[Request]:
    p = request.prompts
    with naming(f"entry {request.output.name}: {called(request, 'prompts.prompt')}"):
        (head, tail), common = _taken((p.head_prompt, p.tail_prompt))
        plain, tags = zip(*(_of_prompt(prompt, common) for prompt in p.prompt), strict=True) if p.prompt else ((), ())
        if not any(tags):
            return [request]
        found = {tag.name: find_lora(tag.name) for every in tags for tag in every}
    groups, first = [], 0
    for loras, members in groupby(tags):
        last = first + len(list(members))
        listed = tuple(LoRAFile(as_option(found[tag.name]), tag.scale) for tag in loras)
        prompts = replace(p, prompt=plain[first:last], head_prompt=head, tail_prompt=tail)
        one = replace(request, prompts=prompts, model=replace(request.model, loras=request.model.loras + listed))
        groups.append(_part(one, first, last, len(plain)))
        first = last
    return groups


def _of_prompt(prompt: Prompt, common: tuple[LoRATag, ...]) -> tuple[Prompt, tuple[LoRATag, ...]]:
    keys = list(prompt) if isinstance(prompt, dict) else [0]
    texts, tags = _taken(_texts(prompt), common)
    return (dict(zip(keys, texts, strict=True)) if isinstance(prompt, dict) else texts[0]), tags


def _taken(texts: Iterable[str], common: tuple[LoRATag, ...] = ()) -> tuple[list[str], tuple[LoRATag, ...]]:
    """Texts of one clip without their tags, and these: a LoRA holds for a whole clip, with one scale."""
    plain, tags = [], {tag.name: tag for tag in common}
    for text in texts:
        rest, found = take_tags(text)
        plain.append(rest)
        for tag in found:
            if tags.setdefault(tag.name, tag) != tag:
                raise UserError(
                    f"got LoRA {tag.name!r} with {tags[tag.name].scale:g} and {tag.scale:g} in one clip, expected one "
                    "scale: loras.schedule changes scales by step"
                )
    return plain, tuple(tags.values())


def _texts(prompt: Prompt) -> list[str]:
    return list(prompt.values()) if isinstance(prompt, dict) else [prompt]


def _part(request: Request, first: int, last: int, total: int) -> Request:
    """What of the values that each prompt has its own of belongs to some of the prompts."""

    def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values[first:last] if len(values) == total else values

    s, p = request.sampling, request.prompts
    return replace(
        request,
        prompts=replace(p, negative_prompt=cut(p.negative_prompt)),
        sampling=replace(s, seed=cut(s.seed), random_seed=cut(s.random_seed)),
    )
