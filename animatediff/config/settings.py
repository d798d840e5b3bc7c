"""YAML and `key=value` to checked dataclasses: OmegaConf reads and writes, pydantic checks. The only home of both."""

from __future__ import annotations

import io
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from animatediff.utils import UserError, describe, unknown_key

T = TypeVar("T")
MAX_BYTES = 2**21  # of a YAML file; the longest that a run writes is far below
MAX_MISTAKES = 10  # that one message lists
LITERAL_DOLLAR = "$\ue000{"  # stands for "${" inside OmegaConf: prompts are text, never interpolated


# ---- types of fields ------------------------------------------------------------------------------------------


def _plain_number(value: Any) -> Any:
    """numpy's and torch's scalars as Python's numbers."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _as_tuple(value: Any) -> Any:
    if hasattr(value, "tolist") and getattr(value, "ndim", 0):  # numpy, torch
        value = value.tolist()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _existing(value: Any) -> Any:
    """A tuple without the empty texts by which YAMLs say that there is none."""
    return tuple(v for v in _as_tuple(value) if v is not None and v != "")


before, read_by, limits = BeforeValidator, PlainValidator, Field  # a field's own reading, and its range

# As strict as YAML is: 1 is no text, "1" no number, true no 1, 1.5 no whole number. An integer is a float.
Int = Annotated[int, BeforeValidator(_plain_number), Strict()]
Float = Annotated[float, BeforeValidator(_plain_number), Strict(), Field(allow_inf_nan=False)]
Bool = StrictBool
Many = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]  # one value stands for a list of one
Files = Annotated[tuple[T, ...], BeforeValidator(_existing)]  # the same, where "" means none


@plain_dataclass(frozen=True)
class FileKind:
    """Marks a field that names a file: what belongs there, and the kinds of weight file that fit (none: no weights)."""

    what: str
    kinds: tuple[str, ...] = ()


class TakesText:
    """Marks a field whose `key=value` is taken as it is."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def options(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks the type and the range of every field, whoever builds it: a YAML or a call."""
    config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True, arbitrary_types_allowed=True)
    made = dataclass(cls, frozen=True, config=config)
    checked_init = made.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked_init(self, *args, **kwargs)
        except ValidationError as errors:
            names = dict(enumerate(f.name for f in fields(made)))  # of positional arguments
            name = lambda path: dotted([*(names.get(p, p) for p in path[:1]), *path[1:]])  # noqa: E731
            raise UserError(listed(f"{cls.__name__}: {line}" for line in explain(errors, made, name))) from None

    made.__init__ = init  # type: ignore[method-assign]
    return made


def opt(default: Any, help: str, *spellings: str, **limits: Any) -> Any:
    """A field of `options`.

    Args:
        default: its default value.
        help: one line, for `--help`, the docs and the web page.
        spellings: other names under which it is known, flat: official YAML, diffusers, mmagic.
        limits: ge, gt, le, lt, multiple_of.
    """
    names = {"validation_alias": AliasChoices(*spellings)} if spellings else {}
    return Field(default, description=help, **names, **limits)


# ---- files ----------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> Any:
    """The plain lists, dicts and scalars of a YAML file.

    Raises:
        UserError: no such file, one that cannot be read, is too large or is not YAML, or a key twice in one mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"got config {path}, which is no file: check the path (current folder: {Path.cwd()})")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"got config {path} of {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(text, where=f"{path} is not valid YAML")


def parse_yaml(text: str, *, where: str) -> Any:
    """As `read_yaml`, from text; `where` starts the message of what is not YAML."""
    if not text.strip():
        return None
    try:
        loaded = OmegaConf.load(io.StringIO(text.replace("${", LITERAL_DOLLAR)))
        return _with_dollars(OmegaConf.to_container(loaded))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{where}: {reason[:300]}") from None


def dump_yaml(content: Any) -> str:
    """YAML text that `read_yaml` reads back; keys in their order."""
    return OmegaConf.to_yaml(OmegaConf.create(_with_dollars(content, "${", LITERAL_DOLLAR))).replace(
        LITERAL_DOLLAR, "${"
    )


def _with_dollars(value: Any, old: str = LITERAL_DOLLAR, new: str = "${") -> Any:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, (list, tuple)):
        return [_with_dollars(v, old, new) for v in value]
    if isinstance(value, Mapping):
        return {_with_dollars(k, old, new): _with_dollars(v, old, new) for k, v in value.items()}
    return value


def split_assignment(item: str) -> tuple[str, str]:
    """`key=value` in two. Raises: UserError without a `=`."""
    key, equals, text = item.partition("=")
    if not equals:
        raise UserError(f"got argument {describe(item)}, expected key=value, such as steps=10")
    return key.strip(), text


def parse_value(text: str, *, is_text: bool, where: str) -> Any:
    """The value of a `key=value`. Text is taken as it is, quotes and colons included, but for `[a, b]` and `{0: a}`."""
    if is_text and not (text[:1] + text[-1:] in ("[]", "{}") and len(text) > 1):
        return text
    if not text.strip():
        return None
    try:
        return parse_yaml(f"value: {text}", where=where)["value"]
    except (UserError, TypeError):
        if is_text:
            return text
        expected = "expected a value such as 3, 0.5, true, [1, 2] or {0: 1}"
        raise UserError(f"{where}: got {describe(text)}, {expected}") from None


# ---- checking -------------------------------------------------------------------------------------------------


@cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def build(cls: type[T], values: Any, *, where: str, name: Callable[[tuple[Any, ...]], str] | None = None) -> T:
    """A checked dataclass from a mapping of raw values.

    Args:
        cls: made by `options`, or a standard dataclass.
        where: starts every message, e.g. the file and the entry.
        name: how a field is called in messages, from its path; by default with dots and brackets.

    Raises:
        UserError: all mistakes, a line each: unknown keys (the nearest known one is named), missing, mistyped or
            out-of-range values.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix}got {describe(values)}, expected keys with values")
    try:
        return _adapter(cls).validate_python({str(k): v for k, v in values.items()})
    except ValidationError as errors:
        raise UserError(listed(prefix + line for line in explain(errors, cls, name or dotted))) from None
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def listed(lines: Iterable[str]) -> str:
    """Mistakes, a line each, the first MAX_MISTAKES of them."""
    unique = list(dict.fromkeys(lines))
    more = len(unique) - MAX_MISTAKES
    return "\n".join(unique[:MAX_MISTAKES] + ([f"… and {more} more mistakes"] if more > 0 else []))


def explain(errors: ValidationError, cls: type, name: Callable[[tuple[Any, ...]], str]) -> list[str]:
    """One line for each mistake that pydantic found: the field, what was got, what is expected."""
    lines: dict[tuple[Any, ...], str] = {}
    for error in errors.errors(include_url=False):
        path = tuple(p for p in error["loc"] if isinstance(p, int) or "[" not in p and "-" not in p)
        if error["type"] == "unexpected_keyword_argument":
            lines[path] = _unknown(cls, path, name) if len(lines) < MAX_MISTAKES else f"unknown key {path[-1]!r}"
        elif error["type"] == "value_error":
            where, message = name(path), str(error["ctx"]["error"])
            lines[path] = where + (": " if where and not message.startswith("[") else "") + message
        elif error["type"] == "missing":
            lines[path] = f"{name(path)} is missing, expected a value: add it"
        else:
            lines[path] = f"{name(path)}: got {describe(error['input'])}, expected {_expected(error)}"
    return list(lines.values())


def dotted(path: Sequence[Any]) -> str:
    """("a", 0, "b") as a[0].b"""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def canonical(cls: type, name: str) -> str:
    """The name of a field of `options` that goes by any of its spellings."""
    for own, info in getattr(cls, "__pydantic_fields__", {}).items():
        if name == own or (info.validation_alias and name in info.validation_alias.choices):
            return own
    return name


def _unknown(cls: type, path: tuple[Any, ...], name: Callable[[tuple[Any, ...]], str]) -> str:
    for step in path[:-1]:
        if isinstance(step, str) and (hint := typing.get_type_hints(cls).get(canonical(cls, step))):
            cls = next(iter(_dataclasses_of(hint)), cls)
    inside = f"{name(path[:-1])}: " if len(path) > 1 else ""
    infos = getattr(cls, "__pydantic_fields__", {}).items()
    spellings = {n: (n, *(i.validation_alias.choices if i.validation_alias else ())) for n, i in infos}
    if same := spellings.get(canonical(cls, str(path[-1]))):
        expected = f"expected one of {', '.join(same)}: remove the rest"
        return f"{inside}got {path[-1]!r} beside another spelling of it, {expected}"
    known = [s for names in spellings.values() for s in names]
    hints = typing.get_type_hints(cls).items()
    if groups := [
        own for own, hint in hints if any(path[-1] in (f.name for f in fields(c)) for c in _dataclasses_of(hint))
    ]:
        return f"{inside}unknown key {path[-1]!r}, expected it in {' or '.join(groups)}: {groups[0]}.{path[-1]}"
    return inside + unknown_key(path[-1], known or [f.name for f in fields(cls)])


def _dataclasses_of(hint: Any) -> Iterable[type]:
    if hasattr(hint, "__dataclass_fields__"):
        yield hint
    for argument in getattr(hint, "__args__", ()):
        yield from _dataclasses_of(argument)


def _expected(error: Any) -> str:
    ctx, kind = error.get("ctx", {}), error["type"]
    if kind == "multiple_of":
        step, value = ctx["multiple_of"], error["input"]
        return f"a multiple of {step:g}: use {max(int(value - value % step), int(step))}"
    if kind == "literal_error":
        plain = ctx["expected"].replace("'", "").replace("False", "false").replace("True", "true")
        choices = [c for c in plain.replace(" or ", ", ").split(", ") if c]
        return f"one of {', '.join(choices)}" if len(choices) > 4 else " or ".join(choices)
    texts = {
        "greater_than_equal": "at least {ge:g}",
        "greater_than": "more than {gt:g}",
        "less_than_equal": "at most {le:g}",
        "less_than": "less than {lt:g}",
        "too_short": "at least {min_length}",
        "missing": "a value",
    }
    types = {
        "int": "a whole number",
        "float": "a number",
        "finite": "a number",
        "bool": "true or false",
        "string": "text (in quotes)",
        "tuple": "a list",
        "dict": "keys with values",
        "dataclass": "keys with values",
        "none": "no value",
    }
    return texts.get(kind, types.get(kind.split("_")[0], error["msg"])).format(**ctx)
