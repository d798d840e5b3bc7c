"""Help on options, made from their fields: for `--help`, docs/options.md and editors (call_options.py)."""

from __future__ import annotations

import typing
from typing import Any, Literal

from animatediff.config.spellings import Option, all_options, flat_names, group_classes
from animatediff.utils import UserError, unknown_key


def explain_options(name: str | None = None) -> str:
    """One option or one group as text; without a name all groups.

    Raises:
        UserError: no option or group is called so.
    """
    options = all_options()
    if name is None:
        return "\n\n".join(_group(group) for group in group_classes())
    if name in group_classes() and name not in flat_names():
        return _group(name)
    option = options.get(name) or flat_names().get(name)
    if option is None:
        raise UserError(unknown_key(name, [*flat_names(), *options, *group_classes()], what="option"))
    others = [n for n in option.spellings if n != option.name]
    lines = [f"{option.dotted}: {option.help}", f"  takes {_takes(option)}; default {_default(option)}"]
    return "\n".join(lines + ([f"  also called {', '.join(others)}"] if others else []))


def options_table() -> str:
    """Every option as Markdown, a table for each group."""
    parts = []
    for group, cls in group_classes().items():
        rows = [f"| `{o.name}` | {_takes(o)} | {_default(o)} | {o.help.replace('|', chr(92) + '|')} | "
                f"{', '.join(f'`{s}`' for s in o.spellings if s != o.name)} |" for o in _options_of(group)]  # fmt: skip
        head = "| option | takes | default | what it does | also called |\n|---|---|---|---|---|"
        parts.append(f"## {group}\n{(cls.__doc__ or '').strip()}\n\n{head}\n" + "\n".join(rows))
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
    extra = ["callback_on_step_end_tensor_inputs: list[str]", "cross_attention_kwargs: dict[str, float]", "sigmas: Any"]
    lines += [f"    {line}" for line in extra]
    return (
        '"""Keyword arguments of the pipeline\'s call, for editors. Made by `python -m animatediff.config.help`."""\n\n'
        "from __future__ import annotations\n\nfrom typing import Any, TypedDict\n\n\n"
        'class CallOptions(TypedDict, total=False):\n    """Every option of a request, flat or as a group."""\n\n'
        + "\n".join(lines) + "\n"
    )  # fmt: skip


def _options_of(group: str) -> list[Option]:
    return [option for option in all_options().values() if option.group == group]


def _group(group: str) -> str:
    rows = [(o.spellings[0] if o.spellings else o.dotted, o.help) for o in _options_of(group)]
    width = max(len(name) for name, _ in rows)
    head = f"{group}: {(group_classes()[group].__doc__ or '').splitlines()[0].strip()}"
    return "\n".join([head, *(f"  {name:{width}}  {help}" for name, help in rows)])


def _takes(option: Option) -> str:
    plain = typing.get_type_hints(group_classes()[option.group])[option.name]
    names = [_type(part) for part in (typing.get_args(plain) if _is_union(plain) else (plain,))]
    return " or ".join(dict.fromkeys(name for name in names if name != "nothing"))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) not in (Literal, tuple, dict, None)


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(str(a) for a in args if a != "")
    if origin is tuple:
        return f"one or a list, each {_type(args[0])}"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(hint, "a value, see the text" if hint is Any else "keys with values")


def _default(option: Option) -> str:
    value = option.default
    if value in (None, "", ()):
        return "–"
    if isinstance(value, tuple):
        value = value[0] if len(value) == 1 else list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "–"


def _python(option: Option) -> str:
    plain = typing.get_type_hints(group_classes()[option.group])[option.name]
    names = {int: "int", float: "float", bool: "bool", str: "str"}
    return names.get(plain, "Any")


def main() -> None:
    """Write call_options.py and docs/options.md."""
    from pathlib import Path

    here = Path(__file__).parent
    (here / "call_options.py").write_text(call_options_source(), encoding="utf-8")
    docs = here.parents[1] / "docs" / "options.md"
    docs.write_text(OPTIONS_HEAD + options_table(), encoding="utf-8")


OPTIONS_HEAD = """# Options

Every option of a prompt config, of the command line (`key=value`) and of the pipeline's call. A YAML may group them as
here, or use any flat name: `sampling: {steps: 30}`, `sampling.steps: 30`, `steps: 30` and `num_inference_steps: 30` are
the same. A group that is off by default is switched on by `true`, or by any of its options. This page is made by
`python -m animatediff.config.help`; `python scripts/animate.py --help KEY` prints one of them.

"""

if __name__ == "__main__":
    main()
