"""What other programs read in prompts and this one takes as words: said once, with the option that does it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from animatediff.config.request import Prompts

LORA_TAG = re.compile(r"<(lora|lyco|hypernet):[^<>:]+(:[^<>]*)?>", re.IGNORECASE)
KEYFRAME_LINES = re.compile(r'^\s*"?\d+"?\s*:.*\n\s*"?\d+"?\s*:', re.MULTILINE)
WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\)")


def prompt_warnings(prompts: Prompts) -> Iterator[str]:
    """One line for each kind of thing in the prompts that has no effect here."""
    texts = [
        text
        for p in (*prompts.prompt, *prompts.negative_prompt)
        for text in (p.values() if isinstance(p, dict) else [p])
    ]
    if tag := next((m[0] for text in texts if (m := LORA_TAG.search(text))), None):
        yield f"{tag} in a prompt is taken as words: name LoRAs by `loras: [{{path: …, scale: …}}]` (lora_model_path)"
    if any(KEYFRAME_LINES.search(text) for text in texts):
        yield "lines such as `0: …` in one text are taken as words: give keyframes as a mapping, prompt={0: …, 8: …}"
    if not prompts.weighting and (tag := next((m[0] for text in texts if (m := WEIGHT.search(text))), None)):
        yield f"{tag} is taken as text, as the official code does: prompt_weighting=true reads it as a weight"
