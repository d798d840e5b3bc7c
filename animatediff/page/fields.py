"""The page's fields: which options it shows, in which sections. What a field is called, takes and does is said by its
option (`config/request.py`)."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union

from animatediff.config.settings import FileKind
from animatediff.config.spellings import Option, all_options, group_classes, usual
from animatediff.config.values import PICTURES, SOUND

LORAS, MOTION_LORAS, NETS, ADAPTERS = 4, 3, 3, 3  # that have fields; more of them go into the last one
PROMPT, NEGATIVE, TRAVEL, MORE = "prompts.prompt", "prompts.negative_prompt", "travel.keyframes", "more"


@dataclass(frozen=True)
class Section:
    """Fields that are folded together: options, or fields of an entry of an option that takes many."""

    title: str
    of: tuple[str, ...]


def _entry(option: str, *names: str, places: int = 1) -> tuple[str, ...]:
    return tuple(f"{option}[{place}].{name}" for place in range(places) for name in names)


SECTIONS = (
    Section("Model", ("model.base", "model.personalised", "model.vae", "model.motion_module", "model.adapter",
                      "model.adapter_scale", "prompts.clip_skip")),
    Section("LoRA", _entry("model.loras", "path", "scale", places=LORAS)),
    Section("MotionLoRA", _entry("model.motion_loras", "path", "scale", places=MOTION_LORAS)),
    Section("Size and length", ("size.width", "size.height", "size.num_frames", "output.fps")),
    Section("Sampling", ("sampling.sampler", "sampling.steps", "sampling.guidance_scale", "sampling.seed",
                         "sampling.timestep_spacing", "sampling.eta", "guidance.rescale", "pag.scale", "motion.scale")),
    Section("Prompt travel", (TRAVEL, "travel.interpolation", "prompts.head_prompt", "prompts.tail_prompt",
                              "prompts.weighting")),
    Section("Long clips and loops", ("windows.schedule", "windows.length", "windows.overlap", "windows.fuse",
                                     "loop.mode", "noise.type")),
    Section("First and last frame", ("inputs.image", "inputs.last_image", "inputs.image_ramp",
                                     "pia.image", "pia.motion", "i2v.image", "i2v.drift")),
    Section("Video in", ("inputs.video", "inputs.mask", "inputs.strength", "inputs.video_start", "inputs.video_stride",
                         "inputs.video_fps", "inputs.inversion", "inputs.inversion_prompt", "inputs.extend")),
    Section("ControlNet", _entry("controlnets.nets", "path", "images", "preprocessor", "scale", "start", "end",
                                 places=NETS)),
    Section("SparseCtrl", ("sparsectrl.path", "sparsectrl.images", "sparsectrl.frames", "sparsectrl.scale",
                           "sparsectrl.normalize")),
    Section("IP-Adapter", ("ip_adapters.image_encoder",
                           *_entry("ip_adapters.adapters", "path", "images", "scale", "layers", "fit",
                                   places=ADAPTERS))),
    Section("Larger and smoother", ("finish.scale", "finish.upscaler", "finish.strength", "finish.enlarge",
                                    "finish.steps", "finish.tile", "finish.match_colors", "finish.interpolate",
                                    "finish.interpolator", "finish.audio")),
    Section("Output", ("output.format", "output.loop_count")),
    Section("Memory", ("memory.max", "memory.offload", "memory.weights", "memory.vae_tile", "memory.split_guidance")),
)  # fmt: skip
PLAIN_GROUPS = {"model", "prompts", "travel", "size", "sampling", "inputs", "output", "controlnets", "sparsectrl",
                "ip_adapters", "finish", "memory"}  # fmt: skip  # whose options are understood without the group's name
OWN = (PROMPT, NEGATIVE, TRAVEL, MORE)  # read in ways of their own


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name: of its option, `size.height`, or of an entry's field, `model.loras[0].path`.
        label, help: what the page shows.
        takes: file, media, medias, choice, switch, number, whole, slider, text, or value (as YAML spells it).
        default: of the option; None and "" are left out.
        choices: of a choice.
        least, most: of a slider.
        kind: of a file.
    """

    name: str
    label: str
    help: str
    takes: str
    default: Any = None
    choices: tuple[Any, ...] = ()
    least: float = 0.0
    most: float = 1.0
    kind: FileKind | None = None

    @property
    def option(self) -> str:
        """Its option, whichever entry of it it belongs to."""
        return self.name.partition("[")[0]


@cache
def form_fields() -> dict[str, Field]:
    """Every field of the sections, by name."""
    return {name: _field(name) for section in SECTIONS for name in section.of if name not in OWN}


def _field(name: str) -> Field:
    option = all_options()[name.partition("[")[0]]
    cls, own = group_classes()[option.group], option.name
    if "[" in name:
        own = name.rpartition(".")[2]
        cls = next(part for part in _parts(option.hint) if hasattr(part, "__pydantic_fields__"))
    info = cls.__pydantic_fields__[own]
    hint = typing.get_type_hints(cls, include_extras=True)[own]
    default = None if info.is_required() else info.default
    kind = next((part for part in _parts(hint) if isinstance(part, FileKind)), None)
    if own == "path" and "[" in name:
        kind = option.files
    help = info.description or (kind.what if kind else "")
    limits = {key: value for part in (*info.metadata, *_parts(hint)) for key, value in _limits(part)}
    takes, choices = _takes(hint, default, kind, limits)
    if name == "windows.schedule":  # the switch of its group
        default, choices = "", ("", *choices)
    help = "; ".join(part for part in (help, _range(limits) if takes in ("number", "whole") else "") if part)
    bounds = (float(limits.get("ge", 0)), float(limits.get("le", 1)))
    place = re.search(r"\[([1-9])\]", name)
    label = (f"File {int(place[1]) + 1}" if place else "File") if own == "path" else _label(option, own)
    return Field(name, label, sentence(help), takes, default, choices, *bounds, kind)


def _label(option: Option, own: str) -> str:
    """The option's name in words, with its group where the section is about something else."""
    words = own if option.group in PLAIN_GROUPS else usual(option.dotted)
    words = re.sub(r"[_.]", " ", words)
    for acronym in ("PIA", "I2V", "PAG", "VAE", "FPS"):
        words = re.sub(rf"\b{acronym.lower()}\b", acronym, words)
    return sentence(words)


def sentence(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in (*typing.get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from _parts(part)


def _limits(part: Any) -> list[tuple[str, float]]:
    found = [(key, getattr(part, key, None)) for key in ("ge", "gt", "le", "lt", "multiple_of")]
    inside = [pair for p in getattr(part, "metadata", ()) for pair in _limits(p)]
    return [(k, v) for k, v in found if isinstance(v, (int, float))] + inside


def _range(limits: Mapping[str, float]) -> str:
    """Limits that do not go without saying."""
    words = {"gt": "more than {:g}", "lt": "less than {:g}", "le": "at most {:g}", "multiple_of": "a multiple of {:g}"}
    return ", ".join(words[key].format(limits[key]) for key in words if limits.get(key, 1e4) < 1e4)


def _takes(hint: Any, default: Any, kind: FileKind | None, limits: Mapping[str, float]) -> tuple[str, tuple[Any, ...]]:
    """What a field takes, and the choices of a choice."""
    optional = typing.get_origin(hint) in (Union, types.UnionType) and type(None) in typing.get_args(hint)
    inner = next(p for p in typing.get_args(hint) if p is not type(None)) if optional else hint
    while typing.get_origin(inner) is typing.Annotated:
        inner = typing.get_args(inner)[0]
    if kind in (PICTURES, SOUND):
        return ("medias" if default == () else "media"), ()
    if kind:
        return "file", ()
    if typing.get_origin(inner) is Literal:
        return "choice", typing.get_args(inner)
    if inner is bool:
        return "switch", ()
    if inner in (int, float):
        bounded = "ge" in limits and "le" in limits and limits["le"] - limits["ge"] <= 10 and inner is float
        return ("slider" if bounded and not optional else "whole" if inner is int else "number"), ()
    return ("text" if inner is str else "value"), ()
