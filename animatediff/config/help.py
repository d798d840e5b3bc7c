"""Help on options, made from their fields: for `--help`, docs/options.md and editors (call_options.py)."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from animatediff.config.condition_options import IPAdapter, LayerPreset
from animatediff.config.settings import FileKind, Files, Many, before, read_by
from animatediff.config.spellings import SHORT, Option, all_options, flat_names, group_classes
from animatediff.config.values import Images, Media, PathText, Pictures, Prompt, Seed
from animatediff.utils import UserError, unknown_key

LAYERS = typing.get_type_hints(IPAdapter, include_extras=True)["layers"]
WORDS = (  # of values that are read in ways of their own
    (Prompt, "text or {frame: text}"),
    (Media, "file or folder of pictures"),
    (Images, "picture, or a list of them"),
    (Pictures, "file, folder of pictures, a list of them, or {frame: picture}"),
    (Seed, "whole number"),
    (PathText, "path"),
    (LAYERS, f"{', '.join(typing.get_args(LayerPreset))}, or {{layer: number}}"),
)
PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text"}
NEEDED = "needed"


# ---- fields in words ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Described:
    """A field in words.

    Attributes:
        default: as YAML has it; "" where it is nothing, NEEDED where there is none.
        others: its other names.
        keys: the class of what it takes, where that has keys of its own.
    """

    name: str
    takes: str
    default: str
    help: str
    others: tuple[str, ...] = ()
    keys: type | None = None

    @property
    def line(self) -> str:
        """All but the name, for the console."""
        return f"{self.help} ({self.takes}{self.default and f'; {self.default}'})".lstrip()


def described(cls: type, *, file: FileKind | None = None) -> list[Described]:
    """The fields of a class of options; or of a plain dataclass, where comments behind them are their help.

    Args:
        file: what belongs into the field `path`.
    """
    hints, infos = typing.get_type_hints(cls, include_extras=True), vars(cls).get("__pydantic_fields__", {})
    comments = {} if infos else dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    found = []
    for field in dataclasses.fields(cls):
        name, hint, info = field.name, hints[field.name], infos.get(field.name)
        needed = info.is_required() if info else field.default is dataclasses.MISSING
        default = NEEDED if needed else _as_yaml(info.default if info else field.default)
        help = (info.description or "").rstrip(",") if info else comments.get(name, "")
        help = help or (file.what if file and name == "path" else "")
        aliases = info.validation_alias.choices if info and info.validation_alias else ()
        others = tuple(alias for alias in aliases if alias != name)
        takes = _takes(hint, length=_length(info.metadata if info else ()))
        found.append(Described(name, takes, default, help, others, next(_dataclasses_in(hint), None)))
    return found


def _takes(hint: Any, *, length: int = 0) -> str:
    """What a type takes; `length` is that of a list that has to have one."""
    origin, args, marks = typing.get_origin(hint), typing.get_args(hint), getattr(hint, "__metadata__", ())
    if origin is Annotated:
        if words := next((words for kind, words in WORDS if kind.__metadata__[0] in marks), None):
            return words
        if args[0] is Any:
            return _varying(marks)
        if any(kind.__metadata__[0] in marks for kind in (Many, Files)):
            item = _takes(typing.get_args(args[0])[0])
            return f"[{', '.join([item] * length)}]" if length else f"{item}, or a list of them"
        from_path = dataclasses.is_dataclass(args[0]) and any(isinstance(mark, before) for mark in marks)
        return "path or " * from_path + _takes(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_takes(part) for part in args if part is not types.NoneType))
    if origin is Literal:
        return ", ".join(str(choice) for choice in args if choice != "")
    if origin is tuple:
        words = [_takes(part) for part in args if part is not ...]
        return f"list of {words[0]}{'s' * (args[0] is not bool)}" if args[-1] is ... else f"[{', '.join(words)}]"
    if origin is dict:
        return f"{{name: {_takes(args[1])}}}"
    if dataclasses.is_dataclass(hint):
        names = [f"{field.name}: …" for field in dataclasses.fields(hint)]
        return f"{{{', '.join(names[:2] + ['…'] * (len(names) > 2))}}}"
    return PLAIN[hint]


def _varying(marks: Iterable[Any]) -> str:
    """Of `values.varying`, whose reader knows whether it wants the steps."""
    read = next(mark.func for mark in marks if isinstance(mark, read_by))
    try:
        read(1.0)
    except UserError:
        return "{part%: number}"
    return "number, one per frame, {frame: number} or {part%: number}"


def _length(limits: Sequence[Any]) -> int:
    """Of a list that may have no other; else 0."""
    names = ("min_length", "max_length")
    least, most = (next((getattr(one, name) for one in limits if hasattr(one, name)), 0) for name in names)
    return most if least == most else 0


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses_in(part)


def _as_yaml(value: Any) -> str:
    if value is None or value in ("", (), {}) or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, tuple):
        return _as_yaml(value[0]) if len(value) == 1 else f"[{', '.join(map(_as_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- as Markdown and on the console ---------------------------------------------------------------------------


def fields_table(
    fields: Sequence[Described], sections: Mapping[type, str], *, flat: Sequence[Sequence[str]] | None = None
) -> str:
    """A Markdown table with a row for each field.

    Args:
        sections: the headings under which the keys of classes stand, for links.
        flat: the flat names of each; without, the last column has the other names, if there are any.
    """
    others = [field.others for field in fields] if flat is None else flat
    head = ["option", "takes", "default", "what it does", "also called" if flat is None else "flat names"]
    columns = 5 if flat is not None or any(others) else 4
    rows = [f"| {' | '.join(head[:columns])} |", f"|{'---|' * columns}"]
    for field, names in zip(fields, others, strict=True):
        name = f"[`{field.name}`]({anchor(sections[field.keys])})" if field.keys else f"`{field.name}`"
        default = field.default if field.default in ("", NEEDED) else f"`{field.default}`"
        cells = (name, field.takes, default, field.help.replace("|", "\\|"), ", ".join(f"`{n}`" for n in names))
        rows.append(f"| {' | '.join(cell or '–' for cell in cells[:columns])} |")
    return "\n".join(rows)


def anchor(heading: str) -> str:
    """The link to a heading of the same page, as GitHub makes it."""
    return "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names and what is said of them, in two columns of the console."""
    width = max(len(name) for name, _ in rows)
    return [f"  {name:{width}}  {said}" for name, said in rows]


def summary(cls: type) -> str:
    """The first paragraph of a class's description, in one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


# ---- options of a request -------------------------------------------------------------------------------------


def explain_options(name: str | None = None) -> str:
    """What is called so, as text: a group, or options by their dotted, flat or own name; without a name all groups.

    Raises:
        UserError: no option or group is called so.
    """
    if name is None:
        return "\n\n".join(_group(group) for group in group_classes())
    options = all_options()
    found = [o for o in options.values() if o.group != name and name in (o.dotted, o.name, *flat_spellings(o))]
    found.sort(key=lambda o: o.name == name and name not in flat_spellings(o))
    if name in group_classes():
        entries = [entry for option in _options_of(name) for entry in _entries(option)]
        return "\n\n".join(["\n".join([_group(name), *entries]), *map(_option, found)])
    if not found:
        raise UserError(unknown_key(name, [*flat_names(), *options, *group_classes()], what="option"))
    return "\n\n".join(map(_option, found))


def flat_spellings(option: Option) -> tuple[str, ...]:
    """Every name of an option without its group, which itself may stand for one of its options."""
    short = (option.group,) if SHORT.get(option.group) == option.name else ()
    return short + option.spellings


def options_table() -> str:
    """Every option as Markdown, a table for each group, and one for the entries of lists."""
    entries = [o for o in all_options().values() if _field(o).keys]
    sections = {_field(option).keys: f"Each of `{option.dotted}`" for option in entries}
    parts = []
    for group, cls in group_classes().items():
        options = _options_of(group)
        fields = fields_table([_field(o) for o in options], sections, flat=[flat_spellings(o) for o in options])
        parts.append(f"## {group}\n{summary(cls)}\n\n{fields}")
        for option in (o for o in options if o in entries):
            keys = _field(option).keys
            fields = fields_table(described(keys, file=option.files), sections)
            parts.append(f"### {sections[keys]}\n{summary(keys)}\n\n{fields}")
    return "\n\n".join(parts) + "\n"


def call_options_source() -> str:
    """The source of `config/call_options.py`, for editors that complete keyword arguments."""
    named = {
        "prompt",
        "num_frames",
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "eta",
    }
    flat = {name: o for name, o in flat_names().items() if name not in named and name.isidentifier()}
    lines = [f"    {name}: {_python(o)}" for name, o in flat.items()]
    lines += [f"    {group}: Any" for group in group_classes() if group not in flat]
    extra = ["callback_on_step_end_tensor_inputs: list[str]", "cross_attention_kwargs: dict[str, float]", "sigmas: Any",
             "pooled_prompt_embeds: Any", "negative_pooled_prompt_embeds: Any"]  # fmt: skip
    lines += [f"    {line}" for line in extra]
    return (
        '"""Keyword arguments of the pipeline\'s call, for editors. Made by `python -m animatediff.config.help`."""\n\n'
        "from __future__ import annotations\n\nfrom typing import Any, TypedDict\n\n\n"
        'class CallOptions(TypedDict, total=False):\n    """Every option of a request, flat or as a group."""\n\n'
        + "\n".join(lines) + "\n"
    )  # fmt: skip


def _options_of(group: str) -> list[Option]:
    return [option for option in all_options().values() if option.group == group]


def _field(option: Option) -> Described:
    return next(field for field in described(group_classes()[option.group]) if field.name == option.name)


def _group(group: str) -> str:
    rows = [(o.spellings[0] if o.spellings else o.dotted, o.help) for o in _options_of(group)]
    return "\n".join([f"{group}: {summary(group_classes()[group])}", *aligned(rows)])


def _option(option: Option) -> str:
    field, others = _field(option), [name for name in flat_spellings(option) if name != option.name]
    lines = [f"{option.dotted}: {option.help}", f"  takes {field.takes}; default {field.default or '–'}"]
    return "\n".join(lines + [f"  also called {', '.join(others)}"] * bool(others) + _entries(option))


def _entries(option: Option) -> list[str]:
    """The keys of each entry of an option."""
    if not (keys := _field(option).keys):
        return []
    return [f"each of {option.dotted}: {summary(keys)}",
            *aligned([(field.name, field.line) for field in described(keys, file=option.files)])]  # fmt: skip


def _python(option: Option) -> str:
    plain = typing.get_type_hints(group_classes()[option.group])[option.name]
    names = {int: "int", float: "float", bool: "bool", str: "str"}
    return names.get(plain, "Any")


def main() -> None:
    """Write call_options.py and docs/options.md."""
    here = Path(__file__).parent
    (here / "call_options.py").write_text(call_options_source(), encoding="utf-8")
    (here.parents[1] / "docs" / "options.md").write_text(OPTIONS_HEAD + options_table(), encoding="utf-8")


OPTIONS_HEAD = """# Options

Every option of a prompt config, of the command line (`key=value`) and of the pipeline's call, by group. A YAML says the
same by the group, `sampling: {steps: 30}` or `sampling.steps: 30`, and by any flat name of the last column, `steps: 30`
or `num_inference_steps: 30`. An option without flat names (`–`) needs its group: `finish.tile: 512`.

`windows`, `freeu` and `freeinit` are off by default. `windows: open`, `freeu: true` and `freeinit: true` switch them
on, and so does any option inside the group, such as `windows.length: 8`. `window_length` and other flat names do not;
they need `windows` or `window_schedule`.

Files are paths; for pictures a call also takes PIL images, arrays and tensors ([call.md](call.md)). Numbers that vary
by frame or step are explained in [steering.md](steering.md#numbers-that-vary). This page is made by
`python -m animatediff.config.help`; `python scripts/animate.py --help KEY` prints an option or a group.

"""

if __name__ == "__main__":
    main()
