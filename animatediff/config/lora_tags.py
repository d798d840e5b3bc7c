"""`<lora:name:0.8>` in prompts, as AUTOMATIC1111's web UI reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from animatediff.utils import UserError, describe

LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>:]+)((?::[^<>:]*)*)>", re.IGNORECASE)
MOST_TAGS = 100


@dataclass(frozen=True)
class LoRATag:
    """A LoRA by the name of its file, perhaps with folders and without its ending; and its scale."""

    name: str
    scale: float


def take_tags(text: str) -> tuple[str, tuple[LoRATag, ...]]:
    """A prompt without its tags, and these, each once. Nothing else is removed: commas stay, as in the web UI.

    Raises:
        UserError: a scale that is no number; two for text encoder and UNet, or for one LoRA.
    """
    found: dict[str, LoRATag] = {}
    for match in LORA_TAG.finditer(text):
        tag = LoRATag(match[1].strip(), _scale(match))
        if found.setdefault(tag.name, tag) != tag:
            raise UserError(f"got {describe(match[0])} after another scale of it, expected one: remove the rest")
    if not found:
        return text, ()
    if len(found) > MOST_TAGS:
        raise UserError(f"got a prompt with {len(found)} LoRAs, expected at most {MOST_TAGS}: remove the rest")
    return LORA_TAG.sub("", text).strip(), tuple(found.values())


def _scale(match: re.Match[str]) -> float:
    """Of `:0.8`, `:0.8:0.8` (text encoder, UNet) or `:te=0.8:unet=0.8`; 1 without."""
    texts = [part.strip() for part in match[2].split(":")[1:]]
    try:
        scales = {float(text.removeprefix("te=").removeprefix("unet=")) for text in texts}
    except ValueError:
        scales = {float("nan")}
    if len(scales) > 1:
        raise UserError(f"got {describe(match[0])}, expected one scale for text encoder and UNet: give one number")
    scale = next(iter(scales), 1.0)
    if not abs(scale) < 1000:  # nor NaN
        raise UserError(f"got {describe(match[0])}, expected a number, as in <lora:{match[1]}:0.8>")
    return scale
