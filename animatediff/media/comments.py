"""The settings that clips carry in the comments of their files, where anybody may have written anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from animatediff.media.pictures import DAMAGE

MAX_LENGTH = 2**20  # characters
EXIF_USER_COMMENT = 0x9286
EXIF_SUB_FOLDER = 0x8769
ASCII_CODE = b"ASCII\0\0\0"  # how an EXIF user comment starts


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(v, str) for v in value.values()))


KNOWN: dict[str, Callable[[Any], bool]] = {  # what readers rely on
    "frames": lambda v: type(v) is int and 0 < v < 2**20,
    "fps": lambda v: type(v) in (int, float) and 0 < v <= 1000,
    "seed": lambda v: type(v) is int and 0 <= v < 2**64,
    "prompt": _is_prompt,
    "negative_prompt": _is_prompt,
}


def parse_settings(text: str) -> dict[str, Any]:
    """The JSON object in a comment, without values that cannot be what their name says; empty for anything else."""
    try:
        found = json.loads(text) if 0 < len(text) <= MAX_LENGTH else {}
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if k not in KNOWN or KNOWN[k](v)} if isinstance(found, dict) else {}


def prompt_and_seed(settings: Mapping[str, Any]) -> tuple[str | dict[str, str] | None, int | None]:
    """What a clip was made from, where its settings say so: in groups, or flat as those of earlier versions."""
    found: dict[str, Any] = {}
    for group, key in (("prompts", "prompt"), ("sampling", "seed")):
        grouped = settings.get(group)
        value = grouped.get(key) if isinstance(grouped, dict) else settings.get(key)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        found[key] = value if KNOWN[key](value) else None
    return found["prompt"], found["seed"]


def comment_of(info: Mapping[str, Any]) -> str:
    """The comment among what Pillow says of a GIF, PNG or WebP; "" where there is none that can be read."""
    text = info.get("comment") or info.get("Comment") or _user_comment(info.get("exif"))
    return text.decode("ascii", errors="replace") if isinstance(text, bytes) else str(text)


def as_exif(comment: str) -> bytes:
    """EXIF data that hold nothing but a comment, ASCII."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_SUB_FOLDER)[EXIF_USER_COMMENT] = ASCII_CODE + comment.encode("ascii")
    return exif.tobytes()


def _user_comment(data: object) -> bytes:
    exif = Image.Exif()
    try:
        exif.load(data if isinstance(data, bytes) else b"")
        comment = exif.get_ifd(EXIF_SUB_FOLDER).get(EXIF_USER_COMMENT, b"")
    except DAMAGE:
        return b""
    return comment.removeprefix(ASCII_CODE) if isinstance(comment, bytes) else b""
