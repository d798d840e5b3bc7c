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
EXIF_TEXTS = {"description": 0x010E, "make": 0x010F, "model": 0x0110}
ASCII_CODE, UNICODE_CODE = b"ASCII\0\0\0", b"UNICODE\0"  # how an EXIF user comment starts


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


def texts_of(info: Mapping[str, Any]) -> dict[str, str]:
    """All texts among what Pillow or libav says of a file, by their names in small letters; endless ones left out.

    Of EXIF data: the user comment, and the description, make and model, where ComfyUI writes.
    """
    found = {str(name).lower(): _decoded(value) for name, value in info.items() if name != "exif"}
    exif = _exif(info.get("exif"))
    found |= {name: _decoded(exif.get(tag)) for name, tag in EXIF_TEXTS.items()}
    found["usercomment"] = _user_text(_raw_user_comment(exif))
    return {name: text for name, text in found.items() if 0 < len(text) <= MAX_LENGTH}


def as_exif(comment: str) -> bytes:
    """EXIF data that hold nothing but a comment, ASCII."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_SUB_FOLDER)[EXIF_USER_COMMENT] = ASCII_CODE + comment.encode("ascii")
    return exif.tobytes()


def _user_comment(data: object) -> bytes:
    return _raw_user_comment(_exif(data)).removeprefix(ASCII_CODE)


def _exif(data: object) -> Image.Exif:
    exif = Image.Exif()
    try:
        exif.load(data if isinstance(data, bytes) else b"")
    except DAMAGE:
        return Image.Exif()
    return exif


def _raw_user_comment(exif: Image.Exif) -> bytes:
    try:
        comment = exif.get_ifd(EXIF_SUB_FOLDER).get(EXIF_USER_COMMENT, b"")
    except DAMAGE:
        return b""
    return comment if isinstance(comment, bytes) else b""


def _user_text(comment: bytes) -> str:
    """A user comment by the code that its first eight bytes name."""
    if not comment.startswith(UNICODE_CODE):
        return _decoded(comment.removeprefix(ASCII_CODE).lstrip(b"\0"))
    data = comment.removeprefix(UNICODE_CODE)
    zeros = data[::2].count(0), data[1::2].count(0)  # of most texts the higher bytes are 0
    return data.decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", errors="replace").lstrip("\ufeff")


def _decoded(value: object) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    return value if isinstance(value, str) else ""
