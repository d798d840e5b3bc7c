"""What other programs read in prompts and this one takes as words: said once, with the option that does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from animatediff.config.lora_tags import LORA_TAG
from animatediff.config.request import Prompts

HYPERNETWORK = re.compile(r"<hypernet:[^<>]*>", re.IGNORECASE)
EDITING = re.compile(r"(?<!\\)\[[^\[\]:|]*[:|][^\[\]]*\]")
AND = re.compile(r"\bAND\b")
WILDCARD = re.compile(r"__[^\W_][\w/*-]*?__|\{[^{}|]*\|[^{}]*\}")
KEYFRAMES = re.compile(r'^[ \t]*"?\d+"?\s*:.*\n\s*"?\d+"?\s*:|\A\s*\{\s*"?\d+"?\s*:[^{}]*\}\s*\Z', re.MULTILINE)
WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\)")


def prompt_warnings(prompts: Prompts) -> Iterator[str]:
    """One line for each kind of thing in the prompts that has no effect here."""
    sides = [
        [text for p in side for text in (p.values() if isinstance(p, dict) else [p])]
        for side in ((*prompts.prompt, prompts.head_prompt, prompts.tail_prompt), prompts.negative_prompt)
    ]
    texts = [text for side in sides for text in side]
    advice = "name LoRAs by `lora_model_path: [{path: …, scale: …}]`"
    if not prompts.weighting and (tag := _first(LORA_TAG, texts)):
        yield f"{tag} in a prompt is taken as words: {advice}, or prompt_weighting=true looks for it, in models/ first"
    if prompts.weighting and (tag := _first(LORA_TAG, sides[1])):
        yield f"{tag} in a negative prompt is taken as words: {advice}"
    if tag := _first(HYPERNETWORK, texts):
        yield f"{tag} in a prompt is taken as words: there are no hypernetworks here"
    if tag := _first(EDITING, texts):
        yield f"{tag} in a prompt is taken as words: there is no prompt editing here"
    if _first(AND, texts):
        yield "AND between prompts is taken as a word: there is no composition of prompts here"
    if tag := _first(WILDCARD, texts):
        yield f"{tag} in a prompt is taken as words: there are no wildcards here, give a list, prompt=[…, …]"
    if _first(KEYFRAMES, texts):
        yield (
            "keyframes such as `0: …` in one text are taken as words: give them as a mapping, prompt={0: …, 8: …} "
            "instead of --prompt"
        )
    if not prompts.weighting and (tag := _first(WEIGHT, texts)):
        yield f"{tag} is taken as text, as the official code does: prompt_weighting=true reads it as a weight"


def _first(pattern: re.Pattern[str], texts: Iterable[str]) -> str | None:
    return next((match[0] for text in texts if (match := pattern.search(text))), None)
