"""The golden network as files of every kind, and configs that use them."""

from functools import cache
from pathlib import Path

import yaml
from torch import Tensor

from animatediff.config.spellings import all_options, group_classes, usual
from tests.checkpoints.synthetic import METADATA, TABLES, ldm_tensors, motion_tensors, tensors_of, write

SMALL = {"steps": 2, "L": 2, "H": 16, "W": 16}  # a clip in a fraction of a second


def write_files(folder: Path) -> Path:
    """nano.safetensors, mm_v1|v2|v3.safetensors, motion_lora, adapter, kohya .safetensors, as the goldens know them."""
    write(folder / "nano.safetensors", ldm_tensors(), **METADATA)
    for version in ("v1", "v2", "v3"):
        write(folder / f"mm_{version}.safetensors", motion_tensors(version), version=version)
    for name, table in (("motion_lora", "motion_lora"), ("adapter", "domain_adapter"), ("kohya", "kohya_lora")):
        write(folder / f"{name}.safetensors", _lora(f"nano-{name.replace('_', '-')}", table))
    return folder


@cache
def _lora(salt: str, table: str) -> dict[str, Tensor]:
    tensors = tensors_of(salt, TABLES[table])
    for key in tensors:
        if key.endswith(".alpha"):
            tensors[key].fill_(4.0)  # the rank
    return tensors


def entry(folder: Path, **values: object) -> dict[str, object]:
    """One entry of a prompt config that runs the golden network on small clips."""
    common = {
        "pretrained_model_path": str(folder / "nano.safetensors"),
        "motion_module": str(folder / "mm_v3.safetensors"),
        "prompt": ["a red fox"],
        "seed": 42,
    }
    return common | SMALL | values


def write_config(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return path


def flat(settings: dict) -> dict:
    """A clip's own settings by the usual flat names; files as {"path": …, "sha256": …} under theirs."""
    options, found = all_options(), {}
    for group, values in settings.items():
        for name, value in values.items() if isinstance(values, dict) and group in group_classes() else ():
            option = options[f"{group}.{name}"]
            one = isinstance(value, list) and len(value) == 1 and option.dotted.startswith(("prompts.", "sampling."))
            found[usual(option.dotted)] = value[0] if one else value
    for option, file in settings.get("files", {}).items():
        dotted, bracket, rest = option.partition("[")
        found[usual(dotted) + bracket + rest] = file
    return found | {key: value for key, value in settings.items() if key not in group_classes() and key != "files"}
