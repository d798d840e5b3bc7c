"""Prompt configs: both official grammars and ours, read into requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from animatediff.config.request import Request
from animatediff.config.settings import dump_yaml, listed, read_yaml
from animatediff.config.spellings import as_values, build_request, flat_names, group_classes
from animatediff.utils import UserError, describe, unknown_key

BUNDLED = Path(__file__).resolve().parents[2] / "configs" / "animate" / "shapes.yaml"  # needs a checkout
OTHER_CONFIGS = {  # a key that only they have: what they are for
    "stage": "a training config is for scripts/train.py",
    "cells": "a grid is for scripts/ablate.py --grid",
    "tables": "experiments are for scripts/reproduce.py",
    "unet_additional_kwargs": "an inference config is for --inference-config",
}


@dataclass(frozen=True)
class RunConfig:
    """A prompt config as read: its name (the file's stem), its entries, and what an earlier run recorded in it."""

    name: str
    entries: tuple[Request, ...]
    provenance: dict[str, Any] = field(default_factory=dict)  # versions, and path -> sha256 of the files


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None, *, complete: bool = True) -> RunConfig:
    """Read a prompt config.

    Four shapes are understood: a list of entries (official, 2024), a mapping of name -> entry (official, 2023;
    with `base` and `path`, and a list of motion modules, each of which is run), a single entry, and the
    `config.yaml` that a run writes beside its samples. The keys of an entry are flat, dotted or grouped.

    Args:
        path: the YAML file.
        overrides: raw values that replace every entry's, as from `parse_assignments`. A new `prompt` keeps only
            the first of an entry's negative prompts and seeds, which belonged to the old list; new `timesteps` keep
            none of its steps.
        complete: as of `refusals`.

    Raises:
        UserError: no such file, broken YAML, or unknown, missing, mistyped or out-of-range values: all of them.
    """
    return config_from(read_yaml(path), str(path), name=Path(path).stem, overrides=overrides, complete=complete)


def config_from(
    raw: Any, where: str, *, name: str, overrides: Mapping[str, Any] | None = None, complete: bool = True
) -> RunConfig:
    """The same from what a YAML holds; `where` starts every message."""
    overrides, provenance = dict(overrides or {}), {}
    if overrides:
        _check_overrides(overrides)
    if other := next((what for key, what in OTHER_CONFIGS.items() if isinstance(raw, dict) and key in raw), None):
        raise UserError(f"got {where}, expected a prompt config: {other}")
    if isinstance(raw, dict) and isinstance(raw.get("entries"), list):
        if unknown := set(raw) - {"entries", "provenance"}:
            raise UserError(f"{where}: {unknown_key(min(map(str, unknown)), ['entries', 'provenance'])}")
        raw, provenance = raw["entries"], raw.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise UserError(f"{where}: provenance: got {describe(provenance)}, expected what a run recorded: remove it")
    entries: list[Request] = []
    mistakes: list[str] = []
    for number, values in _named_entries(raw, where):
        at = f"{where}, entry {number}"
        try:
            if not isinstance(values, dict):
                raise UserError(f"{at}: got {describe(values)}, expected keys such as prompt, motion_module, seed")
            for variant in _expand({str(k): v for k, v in values.items()}, at):
                entries.append(_entry(variant, overrides, at, name=str(number), complete=complete))
        except UserError as error:
            mistakes += str(error).split("\n")
    if mistakes:
        raise UserError(listed(mistakes))
    if not entries:
        raise UserError(f"{where}: got no entries, expected a list of them, each with a prompt")
    return RunConfig(name, tuple(entries), provenance)


def config_of(values: Mapping[str, Any], *, name: str) -> RunConfig:
    """A config of one entry, from raw values as of `parse_assignments` alone.

    Raises:
        UserError: unknown, missing, mistyped or out-of-range values.
    """
    return RunConfig(name, (build_request({"name": name, **values}, where="command line"),))


def dump_config(config: RunConfig) -> str:
    """YAML text, grouped, that `load_config` reads back as the same entries and provenance."""
    entries = [as_values(entry, changed_only=True) for entry in config.entries]
    return dump_yaml({"entries": entries, "provenance": config.provenance})


def _entry(values: dict[str, Any], overrides: Mapping[str, Any], where: str, *, name: str, complete: bool) -> Request:
    request = _overridden(values, overrides, where, complete=complete)
    return request if request.output.name else replace(request, output=replace(request.output, name=name))


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any], where: str, *, complete: bool) -> Request:
    if not overrides:
        return build_request(values, where=where, complete=complete)
    request = build_request(_without_overridden(values, overrides), where=where, check=False)
    sampling, prompts = request.sampling, request.prompts
    given = {name for option in overrides for name in _dotted(option)}
    if "prompts.prompt" in given:
        sampling = replace(sampling, random_seed=(), seed=sampling.seed[:1])
        prompts = replace(prompts, negative_prompt=prompts.negative_prompt[:1])
    if "sampling.seed" in given:
        sampling = replace(sampling, random_seed=())
    if "sampling.timesteps" in given:
        sampling = replace(sampling, steps=None)
    request = replace(request, sampling=sampling, prompts=prompts)
    return build_request(overrides, where=where, base=request, complete=complete)


def _dotted(key: str) -> list[str]:
    option = flat_names().get(key)
    return [option.dotted] if option else [key]


def _without_overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values less those that are replaced, so that they need not even be right."""
    replaced = {name for option in overrides for name in _dotted(option)}
    return {k: v for k, v in values.items() if not set(_dotted(k)) & replaced}


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """Their names, types and ranges, before the file's own get a chance to be blamed."""
    build_request(overrides, where="override", check=False)


def _named_entries(raw: Any, where: str) -> list[tuple[Any, Any]]:
    """The entries of either grammar as (name, values)."""
    if isinstance(raw, list):
        return list(enumerate(raw, 1))
    if isinstance(raw, dict):
        known = {*flat_names(), *group_classes(), "path", "base"}
        single = any(str(key).partition(".")[0] in known for key in raw)
        return [(1, raw)] if single or not all(isinstance(v, dict) for v in raw.values()) else list(raw.items())
    raise UserError(f"{where}: got {describe(raw)}, expected a list of entries, each with a prompt")


def _expand(values: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The grammar of 2023 in ours: `path` and `base`, and an entry for each of several motion modules."""
    if "path" in values or "base" in values:
        if clash := {"dreambooth_path", "lora_model_path"} & set(values):
            raise UserError(f"{where}: got both path/base and {min(clash)}, expected one spelling: remove path/base")
        model, base = values.pop("path", None) or "", values.pop("base", None) or ""
        values |= {"dreambooth_path": base or model, "lora_model_path": model if base else ""}
    modules = values.get("motion_module")
    if not isinstance(modules, list):
        return [values]
    if not modules:
        raise UserError(f'{where}: motion_module: got an empty list, expected a path (or "" for none)')
    return [values | {"motion_module": module} for module in modules]
