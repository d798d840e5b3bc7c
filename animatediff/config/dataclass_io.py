"""YAML files and `key=value` texts to dataclasses: every key known, every value of its field's type."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from animatediff.utils import UserError, describe, unknown_key

T = TypeVar("T")


class StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have each key once, and where 1e-4 is a number, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return node


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """The plain lists, dicts and scalars of a YAML file.

    Raises:
        UserError: no such file, not YAML, or a key twice in one mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"got config {path}, which is no file: check the path (current folder: {Path.cwd()})")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (yaml.YAMLError, ValueError, OSError) as error:  # ValueError: bytes that are no text, 2024-13-01
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(content: Any) -> str:
    """YAML text that `read_yaml` reads back; keys in their order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def build_dataclass(cls: type[T], values: Any, *, where: str) -> T:
    """A dataclass from a mapping of raw values, every key known and every value of its field's type.

    A single value stands for a list of one, a text for a dataclass that begins with one; an integer is a float;
    nothing else is converted.

    Args:
        cls: a dataclass with fields of str, int, float, bool, Literal, tuple[…, ...], dict[…, …], unions of these or
            dataclasses. In a union a list or a mapping chooses its type, anything else the first.
        values: key -> raw value.
        where: starts every message, e.g. the file and the entry.

    Raises:
        UserError: an unknown key (the nearest known one is named), a missing or mistyped value.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: got {describe(values)}, expected keys with values")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: {unknown_key(key, list(fields))}")
        if value is None and fields[key].default in ("", None):
            continue
        arguments[key] = convert(value, hints[key], f"{where}: {key}")
    for key, f in fields.items():
        if key not in arguments and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {key} is missing, expected {type_name(hints[key])}: add it")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_overrides(cls: type, items: Sequence[str]) -> dict[str, Any]:
    """Raw values from `key=value` texts, read as the fields of a dataclass want them.

    Text is taken as it is, quotes and colons included; lists of texts are one text, or `[a, b]`; what may also be a
    mapping is one as `{0: a, 8: b}`; the rest is YAML.

    Raises:
        UserError: no `=`, an unknown key, or a value that is not YAML.
    """
    hints, values = typing.get_type_hints(cls), {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"got argument {item!r}, expected key=value, such as steps=10")
        if key not in hints:
            raise UserError(f"override: {unknown_key(key, list(hints))}")
        is_list = typing.get_origin(hints[key]) is tuple and text.startswith("[")
        is_mapping = may_be_mapping(hints[key]) and text.startswith("{") and text.endswith("}")
        if wants_text(hints[key]) and not is_list and not is_mapping:
            values[key] = text
            continue
        try:
            values[key] = yaml.load(text, StrictLoader)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"override: {key}: got {text!r}, expected {type_name(hints[key])}") from None
    return values


def wants_text(hint: Any) -> bool:
    if hint is str:
        return True
    if typing.get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(hint))
    args = typing.get_args(hint)
    return any(wants_text(arg) for arg in (args[1:] if typing.get_origin(hint) is dict else args))


def may_be_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is dict or any(may_be_mapping(arg) for arg in typing.get_args(hint))


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` wants it, by the rules of `build_dataclass`.

    Raises:
        UserError: it is of another type; `where` starts the message.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        by_value = {dict: Mapping, tuple: (list, tuple)}
        fits = (a for a in options if isinstance(value, by_value.get(typing.get_origin(a) or a, ())))
        return None if value is None else convert(value, next(fits, options[0]), where)
    if origin is dict and isinstance(value, Mapping):
        return {_key(k, args[0], where): convert(v, args[1], f"{where}[{k}]") for k, v in value.items()}
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(v, args[0], f"{where}[{i}]" if len(items) > 1 else where) for i, v in enumerate(items))
    if origin is Literal:
        if value in args and type(value) in {type(choice) for choice in args}:
            return value
    elif dataclasses.is_dataclass(hint):
        first = dataclasses.fields(hint)[0].name
        named = {first: value} if isinstance(value, str) and typing.get_type_hints(hint)[first] is str else value
        return build_dataclass(hint, named, where=where)  # type: ignore[arg-type]
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise UserError(f"{where}: got {describe(value)}, expected {type_name(hint)}")


def _key(key: Any, hint: Any, where: str) -> Any:
    """Numbers may be written as text and texts as numbers: YAML and JSON differ in what a key can be."""
    if hint is int and isinstance(key, str) and key.isdecimal():
        return int(key)
    return str(key) if hint is str else convert(key, hint, f"{where}: key")


def type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in args)
    if origin is tuple:
        return f"a list of which each is {type_name(args[0])}"
    if origin in (typing.Union, types.UnionType):
        return type_name(args[0])
    return {str: "text (in quotes)", int: "a whole number", float: "a number", bool: "true or false"}.get(
        hint, "keys with values"
    )
