"""Requests from flat or grouped names, in any spelling; and back: what was changed, which files it names, its help."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from animatediff.config.refusals import refusals
from animatediff.config.request import Request
from animatediff.config.settings import FileKind, TakesText, build, canonical, listed, parse_value, split_assignment
from animatediff.utils import UserError, describe, unknown_key

SHORT = {"loop": "mode", "windows": "schedule", "noise": "type"}  # groups that one plain value may stand for
SWITCHES = ("freeu", "freeinit", "windows")  # groups that are off by default; `true` means their defaults
FLATLESS = (
    "freeu",
    "freeinit",
    "loop",
    "pia",
    "i2v",
    "camera",
    "finish",
)  # groups whose options are only known inside them
ALIASES = {  # other programs' names, of which the nearest of ours is another option
    "cfg": "sampling.guidance_scale",
    "denoise": "inputs.strength",
    "denoising_strength": "inputs.strength",
    "frames": "size.num_frames",
    "length": "size.num_frames",
    "lora": "model.loras",
    "motion_lora": "model.motion_loras",
    "upscale": "finish.scale",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of one group.

    Attributes:
        spellings: every flat name, the usual one first.
        hint: its type.
        files: the marks of files in it.
    """

    group: str
    name: str
    spellings: tuple[str, ...]
    default: Any
    help: str
    hint: Any
    files: FileKind | None

    @property
    def dotted(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def takes_text(self) -> bool:
        """Whether `key=value` takes the value as it is."""
        return any(part in (str, TakesText) for part in _parts(self.hint) if isinstance(part, type))


@cache
def group_classes() -> dict[str, type]:
    """The dataclass of each group, in the order of the request."""
    hints = typing.get_type_hints(Request)
    candidates = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items() if name != "spelled"}
    return {name: next(c for c in found if dataclasses.is_dataclass(c)) for name, found in candidates.items()}


@cache
def all_options() -> dict[str, Option]:
    """Every option by `group.name`. One without other spellings is known flat by its own name, but for FLATLESS."""
    found = {}
    for group, cls in group_classes().items():
        hints = typing.get_type_hints(cls, include_extras=True)
        for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
            aliases = info.validation_alias
            spellings = tuple(aliases.choices) if aliases else () if group in FLATLESS else (name,)
            mark = next((m for m in _parts(hints[name]) if isinstance(m, FileKind)), None)
            option = Option(group, name, spellings, info.default, info.description or "", hints[name], mark)
            found[option.dotted] = option
    return found


def _parts(hint: Any) -> Iterator[Any]:
    """A type hint, its arguments and their annotations, all the way down."""
    yield hint
    for part in (*typing.get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from _parts(part)


@cache
def flat_names() -> dict[str, Option]:
    """Every flat spelling of every option."""
    index: dict[str, Option] = {}
    for option in all_options().values():
        for spelling in option.spellings:
            index.setdefault(spelling, option)
    return index


def usual(dotted: str) -> str:
    """How an option is called where nobody has called it anything: its first flat spelling."""
    option = all_options()[dotted]
    return option.spellings[0] if option.spellings else dotted


# ---- to requests ----------------------------------------------------------------------------------------------


def nest(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Flat, dotted or grouped values in groups, each still under the name it was given; and these names.

    Returns:
        group -> {name as given: value}, or None for a group that is switched off; `group.name` -> name as given.

    Raises:
        UserError: unknown names, all of them; an option given twice.
    """
    nested: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    mistakes: list[str] = []
    for key, value in values.items():
        group, _, inside = str(key).partition(".")
        try:
            if group in group_classes() and inside:
                _put_group(nested, spelled, group, {inside: value}, f"{group}.")
            elif key in group_classes() and _is_group(key, value):
                typed = f"{key}." if isinstance(value, Mapping) else key
                _put_group(nested, spelled, key, _unshortened(key, value), typed)
            elif option := flat_names().get(key):
                _put(nested, spelled, option, key, value, key)
            else:
                mistakes.append(_unknown(str(key), value) if len(mistakes) < 10 else f"unknown key {describe(key)}")
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError(listed(mistakes))
    if values.get("windows") is not True and (window := _window_without_schedule(nested, spelled)):
        raise UserError(window)
    return nested, spelled


def _is_group(key: str, value: Any) -> bool:
    short = key in SHORT and isinstance(value, str)
    switch = key in SWITCHES and isinstance(value, (bool, type(None)))
    flat_too = key in flat_names() and isinstance(value, Mapping) and not (set(map(str, value)) & _names_in(key))
    return (isinstance(value, Mapping) and not flat_too) or short or switch or isinstance(value, group_classes()[key])


def _names_in(group: str) -> set[str]:
    return {n for o in all_options().values() if o.group == group for n in (o.name, *o.spellings)}


def _unshortened(group: str, value: Any) -> Any:
    if isinstance(value, str):
        return {SHORT[group]: value} if value or group != "windows" else None
    if isinstance(value, bool):
        return {} if value else None
    return vars(value) if dataclasses.is_dataclass(value) else value


def _put_group(nested: dict[str, Any], spelled: dict[str, str], group: str, values: Any, typed: str) -> None:
    if values is None:
        nested[group] = None
        return
    nested.setdefault(group, {})
    known = {n: o for o in all_options().values() if o.group == group for n in (o.name, *o.spellings)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{group}: {unknown_key(name, list(dict.fromkeys(o.name for o in known.values())))}")
        _put(nested, spelled, known[name], name, value, typed + name * typed.endswith("."))


def _put(nested: dict[str, Any], spelled: dict[str, str], option: Option, name: str, value: Any, typed: str) -> None:
    if option.dotted in spelled:
        raise UserError(f"got both {spelled[option.dotted]} and {typed}, expected one of them: remove either")
    if value is None and option.default in ("", None):
        return
    spelled[option.dotted] = typed
    nested[option.group] = (nested.get(option.group) or {}) | {name: value}


def _window_without_schedule(nested: dict[str, Any], spelled: dict[str, str]) -> str | None:
    """Flat window options switch no windows on: more often than not the schedule was forgotten."""
    values, by = nested.get("windows"), spelled.get("windows.schedule")
    if not values or (by is not None and values.get(by) or by == "windows"):
        return None
    flat = {
        name: value
        for name, value in values.items()
        if name in flat_names() and spelled.get(flat_names()[name].dotted) == name
    }
    if len(flat) < len(values):
        return None  # grouped: the group is what switches them on
    changed = {name: value for name, value in flat.items() if name != by and value != flat_names()[name].default}
    if not changed:
        nested["windows"] = None
        return None
    name, value = next(iter(changed.items()))
    return f"{name}: got {describe(value)} without a window_schedule: add window_schedule=open, or remove it"


def _unknown(key: str, value: Any, of: str = "") -> str:
    """The message for a key that no option has; `of` is the group that alone may be meant."""
    if key in group_classes():
        inside = ", ".join(o.name for o in all_options().values() if o.group == key)
        near = next((n for n in flat_names() if n.startswith(f"{key}_")), None)
        hint = f", or {near}={describe(value)}" if near else ""
        return f"{key}: got {describe(value)}, expected keys with values ({inside}){hint}"
    group, _, entry = key.partition(".")
    if inside := [name for name in all_options() if name.startswith(f"{group}.")]:
        return unknown_key(key, inside)
    parts = _parts(flat_names()[group].hint) if group in flat_names() else ()
    if any(entry in getattr(part, "__dataclass_fields__", ()) for part in parts):
        return f"unknown key {key!r}, expected it in {group}: {group}={{{entry}: …}}"
    flat = [o.dotted for o in all_options().values() if o.group == of] if of else [*flat_names(), *group_classes()]
    meant = _meant(of)
    near = difflib.get_close_matches(key.lower()[:100], [*flat, *meant], n=1, cutoff=0.8)
    if near and near[0] in meant:
        return f"unknown key {describe(key)}, expected {' or '.join(meant[near[0]])}: correct or remove it"
    return unknown_key(key, flat)


@cache
def _meant(of: str) -> dict[str, list[str]]:
    """ALIASES, and options' own names that are not known flat: how what they may mean is called."""
    aliases = [(name, all_options()[dotted]) for name, dotted in ALIASES.items()]
    found: dict[str, list[str]] = {}
    for name, option in [*aliases, *((option.name, option) for option in all_options().values())]:
        if of == option.group or not of and name not in {*flat_names(), *group_classes()}:
            found.setdefault(name, []).append(usual(option.dotted))
    return found


def build_request(
    values: Mapping[str, Any], *, where: str, base: Request | None = None, check: bool = True, **context: Any
) -> Request:
    """A checked request from flat, dotted or grouped values.

    Args:
        values: raw, as of a YAML or a call.
        where: starts every message; "" where the message is enough.
        base: gives the values of all that is not said.
        check: also check what options say together (`refusals`), which `context` may tell more about.

    Raises:
        UserError: all mistakes, a line each, under the names that were typed.
    """
    prefix = f"{where}: " if where else ""
    try:
        nested, spelled = nest(values)
    except UserError as error:
        raise UserError("\n".join(prefix + line for line in str(error).split("\n"))) from None
    spelled = (base.spelled if base else {}) | spelled
    merged = {name: _merged(getattr(base or DEFAULT, name), nested[name]) for name in nested}

    def name(path: tuple[Any, ...]) -> str:
        return _typed_name(path, merged, spelled)

    request = build(Request, merged, where=where, name=name)
    if base is not None:
        request = dataclasses.replace(base, **{group: getattr(request, group) for group in merged})
    request = dataclasses.replace(request, spelled=spelled)
    if check and (found := [prefix + line for line in refusals(request, called, **context)]):
        raise UserError(listed(found))
    return request


DEFAULT = Request()


def _merged(old: Any, new: Any) -> Any:
    """A group's values with some replaced, each under one name only."""
    if new is None or old is None:
        return new
    group = type(old).__name__
    new = {name: _completed(getattr(old, canonical(type(old), name), None), value) for name, value in new.items()}
    changed = {canonical(type(old), name) for name in new}
    return (
        {f.name: getattr(old, f.name) for f in dataclasses.fields(old) if f.name not in changed} | new if group else new
    )


def _completed(old: Any, new: Any) -> Any:
    """Entries of a list that name no file are the old ones, with what is said of them: a call brings pictures so."""
    items = [new] if isinstance(new, Mapping) else new
    if not (isinstance(old, tuple) and isinstance(items, (list, tuple)) and len(items) == len(old)):
        return new
    pairs = list(zip(old, items, strict=True))
    if not all(dataclasses.is_dataclass(a) and isinstance(b, Mapping) and "path" not in b for a, b in pairs):
        return new
    return [_merged(entry, dict(item)) for entry, item in pairs]


def _typed_name(path: tuple[Any, ...], nested: Mapping[str, Any], spelled: Mapping[str, str]) -> str:
    """A field's path as the user called it: `H`, `size.height`, `prompt[1]`."""
    if len(path) < 2 or path[0] not in group_classes():
        return ".".join(map(str, path))
    group, name, *inside = path
    typed = spelled.get(f"{group}.{canonical(group_classes()[group], name)}", f"{group}.{name}")
    value = (nested.get(group) or {}).get(name)
    many = isinstance(value, (list, tuple)) and len(value) > 1
    steps = [p for i, p in enumerate(inside) if not (i == 0 and isinstance(p, int) and not many)]
    return typed + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in steps)


def called(request: Request, dotted: str) -> str:
    """How the user called an option, else its usual flat spelling."""
    return request.spelled.get(dotted) or usual(dotted)


def updated(request: Request, values: Mapping[str, Any], *, where: str = "", **context: Any) -> Request:
    """Another request, with some values replaced; None leaves a value as it is, but needs a known name, too."""
    known = {*flat_names(), *group_classes()}
    if unknown := next((k for k, v in values.items() if v is None and k.partition(".")[0] not in known), None):
        raise UserError(unknown_key(unknown, list(known), what="argument"))
    return build_request({k: v for k, v in values.items() if v is not None}, where=where, base=request, **context)


def parse_assignments(items: list[str] | tuple[str, ...], *, of: str = "") -> dict[str, Any]:
    """Raw values from `key=value` texts, keys flat or dotted, each value read as its option wants it.

    Args:
        of: the group whose options alone are offered in place of an unknown key; by default all are.

    Raises:
        UserError: no `=`, an unknown key, or a value that is not YAML; all mistakes.
    """
    values, mistakes = {}, []
    for item in items:
        try:
            key, text = split_assignment(item)
            option = all_options().get(key) or flat_names().get(key)
            if option is None and key in group_classes():
                switch = key in SWITCHES and text in ("true", "false")
                values[key] = parse_value(text, is_text=key in SHORT and not switch, where=key)
                continue
            if option is None:
                raise UserError(_unknown(key, text, of))
            values[key] = parse_value(text, is_text=option.takes_text, where=key)
        except UserError as error:
            mistakes.append(f"override: {error}")
    if mistakes:
        raise UserError(listed(mistakes))
    return values


# ---- from requests --------------------------------------------------------------------------------------------


def as_values(request: Request, *, changed_only: bool) -> dict[str, Any]:
    """Grouped plain values that `build_request` reads back as an equal request.

    Args:
        changed_only: leave out what is at its default.
    """
    out: dict[str, Any] = {}
    for group in group_classes():
        value, default = getattr(request, group), getattr(DEFAULT, group)
        if value is None:
            if default is not None:
                out[group] = None
            continue
        every = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kept = {k: v for k, v in every.items() if not (changed_only and _same(v, getattr(default, k, ...)))}
        if kept or default is None:
            out[group] = {name: _plain(v) for name, v in kept.items()}
    return out


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (str, int, float, bool, tuple, dict)) and a == b)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(v) for f in dataclasses.fields(value) if (v := getattr(value, f.name)) not in (None, "")}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """A file that a request names: the option and its place in it, how it was called, and what belongs there."""

    option: str  # such as model.motion_loras[0].path
    called: str
    path: str
    kind: FileKind


def files(request: Request) -> dict[str, NamedFile]:
    """Every file that a request names, by option, in loading order."""
    found = {}
    for option in all_options().values():
        if option.files is None or (group := getattr(request, option.group)) is None:
            continue
        value, name = getattr(group, option.name), called(request, option.dotted)
        many = isinstance(value, tuple)
        for i, item in enumerate(value if many else (value,)):
            place = f"[{i}]" if many else ""
            for inside, path, kind in _files_in(item, option.files):
                dotted = option.dotted + place + inside
                found[dotted] = NamedFile(dotted, name + place + inside, path, kind)
    return found


def _files_in(value: Any, kind: FileKind) -> Iterator[tuple[str, str, FileKind]]:
    """(place, path, kind) of the files in a value: a path, or an entry with a `path` and perhaps marked fields."""
    if isinstance(value, str):
        if value:
            yield "", value, kind
        return
    hints = typing.get_type_hints(type(value), include_extras=True) if dataclasses.is_dataclass(value) else {}
    for name, hint in hints.items():
        mark = kind if name == "path" else next((m for m in _parts(hint) if isinstance(m, FileKind)), None)
        inside = getattr(value, name)
        if mark is None:
            continue
        items = inside.items() if isinstance(inside, dict) else enumerate(inside) if isinstance(inside, tuple) else None
        for place, item in [("", inside)] if items is None else [(f"[{at}]", item) for at, item in items]:
            if isinstance(item, str) and item:
                yield f".{name}{place}", item, mark
