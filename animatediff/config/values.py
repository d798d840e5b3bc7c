"""Kinds of values that options take: texts, paths, pictures, seeds, numbers that vary; and kinds of files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from animatediff.config.keyframes import Keyframes
from animatediff.config.settings import FileKind, TakesText, before, read_by
from animatediff.utils import UserError, describe

MAX_SEED = 2**64 - 1


def _prompt(value: Any) -> str | dict[int, str]:
    """A text, or keyframes {frame: text}; frames may be written as text, as JSON has them."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, Mapping):
        raise UserError(f"got {describe(value)}, expected text (in quotes), or keyframes {{frame: text}}")
    if not value:
        raise UserError("got no keyframes, expected at least one, such as 0")
    keyframes = {}
    for frame, text in value.items():
        number = str(frame).strip()
        if isinstance(frame, bool) or not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise UserError(f"got a keyframe at {frame}, expected the number of a frame, such as 0")
        if not isinstance(text, str):
            raise UserError(f"[{frame}]: got {describe(text)}, expected text (in quotes)")
        keyframes[int(number)] = _text(text)
    return dict(sorted(keyframes.items()))


def _utf8(value: Any) -> Any:
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("got text with half a surrogate pair, which is no character: correct it") from None
    return text


def _path(value: Any) -> Any:
    """A path as text, without NUL, `~` being the home folder."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    if "\0" in value or value != value.encode(errors="replace").decode():
        raise UserError(f"got {value!r}, expected a path")
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:
        raise UserError(f"got {value!r}, expected a path: there is no such user") from None


def _media(value: Any) -> Any:
    """A path in a YAML; in a call also PIL images, arrays and tensors, which the pipeline looks at."""
    if isinstance(value, (bool, int, float, Mapping)):
        raise UserError(f"got {describe(value)}, expected a file, pictures or a tensor")
    return None if isinstance(value, str) and not value else _path(value)


def _images(value: Any) -> Any:
    """Several of them; a tensor or an array stays what it is."""
    if value is None or hasattr(value, "ndim"):
        return () if value is None else value
    items = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_media(item) for item in items if item is not None and not (isinstance(item, str) and not item))


def _pictures(value: Any) -> Any:
    """As `_images`, or keyframes {frame: picture}; frames may be written as text, as JSON has them."""
    if not isinstance(value, Mapping):
        return _images(value)
    frames = {str(frame).strip(): picture for frame, picture in value.items()}
    if wrong := [frame for frame in frames if not (frame.isascii() and frame.isdecimal() and len(frame) < 10)]:
        raise UserError(f"got a keyframe at {wrong[0]}, expected the number of a frame, such as 0")
    if not all(_images(picture) for picture in frames.values()):
        raise UserError("got a keyframe without a picture, expected one for each")
    return {int(frame): _images(picture)[0] for frame, picture in sorted(frames.items(), key=lambda f: int(f[0]))}


def _seed(value: Any) -> int:
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if type(number) is not int or not -1 <= number <= MAX_SEED:
        raise UserError(f"got {describe(number)}, expected 0 to 2^64 - 1, or -1 to draw one")
    return number


def varying(least: float = -math.inf, over_steps: bool = False) -> Any:
    def check(value: Any) -> Any:
        if value is None:
            return None
        keyframes = Keyframes.read(value, least=least)
        if over_steps and not keyframes.over_steps:
            raise UserError("got no percentages of the steps, expected them, such as {0%: 0, 50%: 1}")
        return value

    return Annotated[Any, read_by(check)]


Prompt = Annotated[Any, read_by(_prompt), TakesText]
Media = Annotated[Any, read_by(_media), TakesText]
Images = Annotated[Any, read_by(_images), TakesText]
Pictures = Annotated[Any, read_by(_pictures), TakesText]  # the same, or {frame: picture}
Seed = Annotated[Any, read_by(_seed)]
Varying = varying()  # a number, one per frame, {frame: number} or {part%: number}: see keyframes.py
Text = Annotated[str, before(_utf8)]
PathText = Annotated[str, before(_path)]

IMAGE_MODEL = FileKind("an SD 1.x or SDXL image model", ("sd1-checkpoint", "diffusers-folder", "sdxl-checkpoint"))
PERSONALISED = FileKind("an SD 1.x or SDXL image model", (*IMAGE_MODEL.kinds, "sd1-unet", "sdxl-unet"))
MOTION_MODULE = FileKind("a motion module", ("motion-module", "motion-adapter", "pia", "animatelcm-i2v"))
PLAIN_MOTION_MODULE = FileKind("a motion module without a picture", ("motion-module", "motion-adapter"))
VAE_FILE = FileKind("a VAE", ("vae", *IMAGE_MODEL.kinds))
LORA_FILE = FileKind("a LoRA of an image model", ("lora", "sdxl-lora", "domain-adapter"))
ADAPTER = FileKind("a domain adapter", ("domain-adapter", "lora"))
MOTION_LORA = FileKind("a MotionLoRA", ("motion-lora",))
EMBEDDING = FileKind("a textual inversion for SD 1.x or SDXL", ("textual-inversion", "sdxl-textual-inversion"))
SPARSECTRL = FileKind("a SparseCtrl encoder", ("sparsectrl",))
CONTROLNET = FileKind("a ControlNet for SD 1.x or SDXL", ("controlnet", "sdxl-controlnet"))
IP_ADAPTER = FileKind("an IP-Adapter for SD 1.x or SDXL", ("ip-adapter", "sdxl-ip-adapter"))
IMAGE_ENCODER = FileKind("a CLIP vision model", ("image-encoder",))
CAMERACTRL = FileKind("a CameraCtrl camera encoder", ("cameractrl",))
UPSCALER = FileKind("an upscaler model")
INTERPOLATOR = FileKind("a model of frames between frames")
SOUND = FileKind("a file with sound")
OTHER = FileKind("a file")
PICTURES = FileKind("a picture or clip")
