"""From what was filled in to a request, and back.

What has no field of its own stands in the last one, a line for each, as on the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from animatediff.config.request import Request
from animatediff.config.settings import parse_value
from animatediff.config.spellings import (
    SWITCHES,
    all_options,
    as_values,
    build_request,
    flat_names,
    parse_assignments,
    usual,
)
from animatediff.page.fields import MORE, NEGATIVE, PROMPT, TRAVEL, Field, form_fields, sentence
from animatediff.utils import UserError, describe

MAX_TEXT = 20_000  # characters of a text

# ---- from the form to a request -------------------------------------------------------------------------------


class Mistakes(UserError):
    """What is wrong with a form: sentences by field; "" of what belongs to none."""

    def __init__(self, found: Mapping[str, str]):
        super().__init__("\n".join(found.values()))
        self.found = dict(found)


def read_form(filled: Mapping[str, Any]) -> Request:
    """The request that a form makes, whose options do not contradict each other.

    Args:
        filled: what stands in the fields, by name; media as paths.

    Raises:
        Mistakes: all of them.
    """
    found: dict[str, str] = {}
    values: dict[str, Any] = {}

    def take(name: str, read: Callable[[], Any]) -> None:
        try:
            if (value := read()) is not None:
                values[name] = value
        except UserError as error:
            found[name] = sentence(str(error).removeprefix(": "))

    for name, field in form_fields().items():
        take(name, partial(read_value, field, filled.get(name)))
    for name in (PROMPT, NEGATIVE, MORE):
        take(name, partial(_text, filled.get(name)))
    take(TRAVEL, partial(_prompt, values.get(PROMPT), filled.get(TRAVEL)))
    shown = any(field.takes in ("media", "medias") and name in values for name, field in form_fields().items())
    if not values.get(TRAVEL) and not shown and not {PROMPT, TRAVEL} & found.keys():
        found[PROMPT] = "Say what to show."
    values[PROMPT] = values.pop(TRAVEL, "")
    take(MORE, partial(_assignments, values.pop(MORE, "")))
    more = values.pop(MORE, {})
    values, gaps = _grouped(values)
    found |= dict.fromkeys(gaps, "Got none before the next one: choose a file here, or move the next one up")
    if twice := {_dotted(key) for key in more} & values.keys():
        found[MORE] = sentence(f"{min(twice)} has a field of its own: set it there")
    try:
        request = build_request(values if twice else values | more, where="", check=not found)
    except UserError as error:
        found = placed(error).found | found
    if found:
        raise Mistakes(found)
    return request


def read_value(field: Field, raw: Any) -> Any:
    """What stands in a field, as options take it; None of what is empty.

    Raises:
        UserError: text that is too long, or no value as YAML spells it.
    """
    if raw is None or raw == "" or raw == []:
        return None
    if field.takes in ("number", "whole") and isinstance(raw, str):
        raw = parse_value(text, is_text=False, where="") if (text := _text(raw)) else None
    if field.takes == "whole" and isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if field.takes in ("number", "slider") and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if field.takes == "text":
        return _text(raw)
    if field.takes == "value":
        text = (_text(raw) or "").strip()
        text = f"[{text}]" if "," in text and text[:1] not in ("[", "{") else text
        return parse_value(text, is_text=False, where="") if text else None
    return raw


def _text(raw: Any) -> str | None:
    text = str(raw or "")
    if len(text) > MAX_TEXT:
        raise UserError(f"got {len(text)} characters, expected at most {MAX_TEXT}")
    return text if text.strip() else None


def _prompt(prompt: str | None, rows: Any) -> str | dict[str, str] | None:
    """A text, or keyframes, of which the text stands at frame 0."""
    keyframes = {}
    for frame, said in rows or ():
        words, empty = _text(said), frame is None or frame == "" or frame != frame
        if empty and not words:
            continue
        if empty:
            raise UserError(f"got {describe(words)} without a frame, expected its number, such as 8")
        number = str(frame).strip().removesuffix(".0")
        if number in keyframes:
            raise UserError(f"got frame {number} twice, expected it once")
        keyframes[number] = words or ""
    if not keyframes:
        return prompt
    if prompt and "0" in keyframes:
        raise UserError("got two texts for frame 0, the prompt above and the table's: empty one of them")
    return {"0": prompt, **keyframes} if prompt else keyframes


def _assignments(text: str) -> dict[str, Any]:
    try:
        return parse_assignments([line for line in text.splitlines() if line.strip()])
    except UserError as error:
        raise UserError(str(error).replace("override: ", "")) from None


def _dotted(key: str) -> str:
    return flat_names()[key].dotted if key in flat_names() else key


def _grouped(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values with entries in lists, those that stand as they were left out; windows only where they are on.

    Also the file's fields of entries that are empty before one that is not.
    """
    fields, grouped, entries, gaps = form_fields(), {}, {}, []
    for name, value in values.items():
        if "[" in name:
            place = name.rpartition(".")[0]
            entries.setdefault(place, {})[name.rpartition(".")[2]] = value
        elif name.startswith("windows.") and "windows.schedule" not in values:
            grouped[usual(name)] = value  # which says that the schedule is missing, if this is not the default
        else:
            grouped[name] = value
    for place, entry in entries.items():
        option, _, number = place.removesuffix("]").partition("[")
        if any(value != fields[f"{place}.{name}"].default for name, value in entry.items()):
            gaps += [f"{option}[{empty}].path" for empty in range(len(grouped.get(option, ())), int(number))]
            grouped.setdefault(option, []).append(entry)
    return grouped, gaps


def placed(error: UserError, names: Mapping[str, str] | None = None) -> Mistakes:
    """The lines of an error as sentences beside the fields that they are about.

    Args:
        names: what people called files, by the paths that errors know.
    """
    if isinstance(error, Mistakes):
        return error
    found: dict[str, str] = {}
    for line in str(error).split("\n"):
        line = re.sub(r"^(entry [^:]*)?: ", "", line)
        line = line.replace(" is missing, expected a value: add it", ": choose a file, or empty the fields beside it")
        name, rest = _place(line)
        for path, called in (names or {}).items():
            rest = rest.replace(path, called)
        found[name] = f"{found[name]} {sentence(rest)}" if name in found else sentence(rest)
    return Mistakes(found)


def _place(line: str) -> tuple[str, str]:
    """The field that a line is about, "" if none, and the line without its name."""
    head, _, rest = line.partition(": ")
    if field := _field_of(head):
        return field, rest
    first = line.partition(" ")[0]
    named = [first, *(word for word in re.findall(r"[\w.\[\]]+", line) if "." in word or "_" in word)]
    return next((field for word in named if (field := _field_of(word))), ""), line


def _field_of(name: str) -> str:
    """The field of an option, however it is spelled; the last one of an option without a field."""
    name = _dotted(name)
    option = re.sub(r"\[.*", "", name)
    inside = re.fullmatch(r"(\w+\.\w+)\.(\w+)", name)  # the only entry's field
    known = [*form_fields(), PROMPT, NEGATIVE]
    wanted = (name, f"{inside[1]}[0].{inside[2]}" if inside else "")
    exact = next((field for field in wanted if field in known), "")
    option = inside[1] if inside else option
    near = next((field for field in known if field.partition("[")[0] == option), "")
    return exact or near or (MORE if option in all_options() else "")


# ---- from a request to the form -------------------------------------------------------------------------------


def fill_form(request: Request) -> dict[str, Any]:
    """What stands in every field for a request of one prompt; `read_form` makes the same request of it."""
    rest = as_values(request, changed_only=True)
    filled: dict[str, Any] = {MORE: ""}
    for name, field in form_fields().items():
        if "[" not in name:
            group = getattr(request, field.option.partition(".")[0])
            value = "" if group is None and name == "windows.schedule" else _attribute(group, name, field.default)
            filled[name] = show_value(field, value)
            _drop(rest, name)
    for option in dict.fromkeys(field.option for field in form_fields().values() if "[" in field.name):
        filled |= _fill_entries(request, option, rest)
    (prompt, negative, seed), *_ = request.per_prompt()
    keyframes = prompt if isinstance(prompt, dict) else {0: prompt}
    filled[PROMPT] = keyframes.get(0, "")
    filled[TRAVEL] = [[frame, text] for frame, text in keyframes.items() if frame]
    filled["prompts.head_prompt"] = filled["prompts.tail_prompt"] = ""  # `per_prompt` has put them around the prompt
    filled["sampling.seed"] = str(seed)
    filled[NEGATIVE] = negative if isinstance(negative, str) else ""
    for name in (PROMPT, "sampling.random_seed", "output.name", *((NEGATIVE,) if isinstance(negative, str) else ())):
        _drop(rest, name)
    filled[MORE] = "\n".join(_lines(rest))
    return filled


def _attribute(group: Any, name: str, default: Any) -> Any:
    return default if group is None else getattr(group, name.rpartition(".")[2])


def show_value(field: Field, value: Any) -> Any:
    """A value of an option as its field shows it."""
    if field.takes == "value":
        if value is None or value == ():
            return ""
        plain = value if isinstance(value, (tuple, list)) else (value,)
        if all(isinstance(v, (int, float, str)) for v in plain):
            return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in plain)
        return json.dumps(value, ensure_ascii=False)
    if field.takes == "medias":
        return [str(v) for v in value] if value is not None and len(value) else None
    if field.takes == "media":
        return value or None  # no path is no file, and not the current folder
    if field.takes in ("file", "text"):
        return str(value or "")
    return value


def _fill_entries(request: Request, option: str, rest: dict[str, Any]) -> dict[str, Any]:
    """The fields of an option that takes entries; empty, and all of it left in `rest`, where they cannot hold it."""
    group, _, name = option.partition(".")
    fields = [field for field in form_fields().values() if field.option == option]
    places = len({field.name.rpartition(".")[0] for field in fields})
    entries = getattr(getattr(request, group), name)
    shown = {field.name.rpartition(".")[2] for field in fields}
    fits = len(entries) <= places and not any(_hidden(entry, shown) for entry in entries)
    filled = {}
    for field in fields:
        place, own = re.fullmatch(r".*\[(\d+)\]\.(\w+)", field.name).groups()  # type: ignore[union-attr]
        there = fits and int(place) < len(entries)
        filled[field.name] = show_value(field, getattr(entries[int(place)], own) if there else field.default)
    if fits:
        _drop(rest, option)
    return filled


def _hidden(entry: Any, shown: set[str]) -> bool:
    """Whether an entry says what the form has no field for."""
    defaults = {name: info.default for name, info in type(entry).__pydantic_fields__.items()}
    changed = {f.name for f in fields(entry) if getattr(entry, f.name) != defaults[f.name]} - {"path"}
    return bool(changed - shown) or any(isinstance(getattr(entry, name, None), dict) for name in ("images", "layers"))


def _drop(rest: dict[str, Any], name: str) -> None:
    group, _, own = name.partition(".")
    if isinstance(rest.get(group), dict) and own in rest[group]:
        rest[group] = {key: value for key, value in rest[group].items() if key != own}
        if not rest[group]:
            del rest[group]


def _lines(rest: Mapping[str, Any]) -> Iterator[str]:
    for group, values in rest.items():
        options = {name: all_options()[f"{group}.{name}"] for name in values or ()}
        changed = {name: value for name, value in (values or {}).items() if value != options[name].default}
        if not changed and group in SWITCHES and group != "windows":  # which has a field for its switch
            yield f"{group}=true"
        for name, value in changed.items():
            plain = isinstance(value, str) and options[name].takes_text
            yield f"{group}.{name}={value if plain else json.dumps(value, ensure_ascii=False)}"
