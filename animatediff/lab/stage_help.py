"""Help on the keys of training configs, made from their fields: for `train.py --help` and docs/training-options.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from animatediff.config.help import Described, aligned, anchor, described, fields_table, summary
from animatediff.lab.stage_table import STAGES
from animatediff.training.data.clips import ClipConfig
from animatediff.training.data.virtual_camera import CAMERA_MOVES
from animatediff.training.stage_config import StageConfig
from animatediff.training.stages import ClipTraining, Training
from animatediff.utils import UserError, describe
from animatediff.world.camera import CAMERA
from animatediff.world.series import World
from animatediff.world.shapes import MOTIONS
from animatediff.world.styles import STYLES

SHARED = {StageConfig: "Every stage", Training: "Stages on an image model", ClipTraining: "Stages on clips"}
CHOICES: dict[tuple[type, str], Iterable[str]] = {  # that their classes check themselves
    (ClipConfig, "camera"): CAMERA_MOVES,
    (World, "style"): STYLES,
    (World, "motions"): (*MOTIONS, *CAMERA),
    (World, "oversampled"): (*MOTIONS, *CAMERA),
}


def explain_stage(name: str) -> str:
    """Every key of a stage as text, those within keys as `loop.steps`.

    Raises:
        UserError: no stage is called so.
    """
    if name not in STAGES:
        raise UserError(f"got stage {describe(name)}, expected one of {', '.join(STAGES)}")
    return "\n".join([f"{name}: {summary(STAGES[name])}", *aligned(list(_rows(STAGES[name])))])


def stages_list() -> str:
    """Every stage in a line."""
    return "\n".join(aligned([(name, summary(stage)) for name, stage in STAGES.items()]))


def training_options() -> str:
    """docs/training-options.md: what stages share, what each has of its own, and keys within keys."""
    nested: dict[type, dict[str, None]] = {}
    for stage in STAGES.values():
        for key, cls in _nested(stage):
            nested.setdefault(cls, {})[key] = None
    sections = {cls: ", ".join(f"`{key}`" for key in keys) for cls, keys in nested.items()}
    parts = []
    for shared, heading in SHARED.items():
        names = ", ".join(f"`{name}`" for name, stage in STAGES.items() if issubclass(stage, shared))
        parts.append(f"## {heading}\n{names}.\n\n{fields_table(_own(shared), sections)}")
    for name, stage in STAGES.items():
        links = ", ".join(f"[{s.lower()}]({anchor(s)})" for shared, s in SHARED.items() if issubclass(stage, shared))
        table = fields_table(_own(stage), sections)
        parts.append(f"## `{name}`\n{summary(stage)} Beside the keys of {links}:\n\n{table}")
    for cls, heading in sections.items():
        parts.append(f"## {heading}\n{summary(cls)}\n\n{fields_table(_keys(cls), sections)}")
    return HEAD + "\n\n".join(parts) + "\n"


def _keys(cls: type) -> list[Described]:
    """The fields of a class, with the choices that it checks itself."""
    found = []
    for key in described(cls):
        if choices := CHOICES.get((cls, key.name)):
            key = replace(key, takes=f"{'list of ' * key.takes.startswith('list')}{', '.join(choices)}")
        found.append(key)
    return found


def _own(stage: type) -> list[Described]:
    """Those that a stage adds to its bases'."""
    return [key for key in _keys(stage) if key.name in vars(stage).get("__annotations__", {})]


def _rows(cls: type, before: str = "") -> Iterator[tuple[str, str]]:
    for key in _keys(cls):
        yield before + key.name, key.line
        if key.keys:
            yield from _rows(key.keys, f"{before}{key.name}.")


def _nested(cls: type) -> Iterator[tuple[str, type]]:
    for key in described(cls):
        if key.keys:
            yield key.name, key.keys
            yield from _nested(key.keys)


HEAD = """# Training options

Every key of a training config, by stage, whose name is the key `stage`; [training.md](training.md) says what they do.
A key within a key is `loop: {steps: 10}` in a YAML and `loop.steps=10` on the command line. Where the first one takes
text, a text alone stands for it: `image_data: my_pictures` is `image_data: {image_folder: my_pictures}`.

This page is made by `python -m animatediff.lab.stage_help`; `python scripts/train.py --help STAGE` prints the keys of a
stage.

"""


def main() -> None:
    """Write docs/training-options.md."""
    docs = Path(__file__).parents[2] / "docs"
    (docs / "training-options.md").write_text(training_options(), encoding="utf-8")


if __name__ == "__main__":
    main()
