"""The folder of a run: new or taken up again, its config.yaml, and what the clips in it remember."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import animatediff
from animatediff.config.prompt_yaml import RunConfig, dump_config, load_config
from animatediff.config.request import Request
from animatediff.config.spellings import as_values, called, files, group_classes
from animatediff.features.noise import draw_seed
from animatediff.utils import LOCK, TEMPORARY_PREFIX, UserError, only_writer, replacing


def open_folder(
    config: RunConfig, output_dir: str | Path | None, provenance: Mapping[str, Any], held: ExitStack
) -> tuple[Path, RunConfig]:
    """The folder to write to and the config with all seeds drawn, new or as the folder's own config.yaml has them.

    Args:
        held: has the folder for this run alone until it is closed.

    Raises:
        UserError: a folder of something else, of another run, or in which one is at work.
    """
    alone = partial(only_writer, option="--output-dir", work="run")
    if output_dir is None:
        folder = new_folder(config.name)
    else:
        folder = Path(output_dir)
        if not str(output_dir).strip():
            raise UserError("got --output-dir '', expected a folder")
        if (folder / "config.yaml").is_file():
            held.enter_context(alone(folder))
            return folder, _resume(config, folder, provenance)
        if folder.exists() and not _is_fresh(folder):
            raise UserError(
                f"got --output-dir {folder}, which holds no config.yaml, expected a new or empty folder or that of an "
                "unfinished run: choose another"
            )
        _make_folder(folder, exist_ok=True)
    held.enter_context(alone(folder))
    entries = tuple(_draw_seeds(entry) for entry in config.entries)
    config = RunConfig(config.name, entries, dict(provenance))
    write_config(folder, config)
    return folder, config


def record_hashes(config: RunConfig, folder: Path, hashes: Mapping[str, str]) -> RunConfig:
    """Add the hashes of files to the folder's config.yaml.

    Raises:
        UserError: a file is another than the run began with.
    """
    known = config.provenance.get("weights") or {}
    for path, sha256 in hashes.items():
        if known.get(path, sha256) != sha256:
            raise UserError(f"got {path}, which has changed since {folder} was begun: choose another --output-dir")
    if hashes.keys() <= known.keys():
        return config
    config = replace(config, provenance=config.provenance | {"weights": known | dict(hashes)})
    write_config(folder, config)
    return config


def write_config(folder: Path, config: RunConfig) -> None:
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")


def made_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a clip's bits depend on beside its settings: the same on another device are nearly the same clip."""
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}


def recorded_dtype(provenance: Mapping[str, Any], device: torch.device) -> str | None:
    """The dtype that an earlier run on such a device had."""
    same = str(provenance.get("device", "")).partition(":")[0] == device.type
    return provenance.get("dtype") if same else None


def versions() -> dict[str, str]:
    return {
        "animatediff": animatediff.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def clip_settings(request: Request, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What made a clip, for the clip's own file: `config_from` reads it back.

    Args:
        request: of this clip alone, nothing left open.
        hashes: SHA-256 of every file, by option.
    """
    used = {option: {"path": file.path, "sha256": hashes[option]} for option, file in files(request).items()}
    ((prompt, negative, seed),) = request.per_prompt()
    first = {"prompt": prompt, "negative_prompt": negative, "seed": seed}  # for readers who want no more
    return {**first, **as_values(request, changed_only=True), "files": used, "animatediff": animatediff.__version__}


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether settings say what a clip was sampled from: in groups, or flat as in earlier versions. Grids do not."""
    return isinstance(settings.get("prompts"), dict) or {"prompt", "seed"} <= settings.keys()


def settings_request(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request that a clip's own settings hold, also those of earlier versions, which were flat."""
    if "prompts" in settings:
        return {name: settings[name] for name in group_classes() if name in settings}
    flat = {k: v["path"] if isinstance(v, dict) and "path" in v else v for k, v in settings.items()}
    return {k: v for k, v in flat.items() if k not in ("frames", "animatediff", "training_step", "prompts")}


def run_name(folder: Path) -> str:
    """The name of a run that `new_folder` made the folder of: without the time."""
    return re.sub(r"-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(-\d+)?$", "", folder.name) or "config"


def new_folder(name: str, root: str | Path = "samples") -> Path:
    """Make `<root>/<name>-<time>`, numbered where there is one already."""
    time = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in range(1, 1000):
        folder = Path(root) / (f"{name}-{time}" if attempt == 1 else f"{name}-{time}-{attempt}")
        try:
            _make_folder(folder)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"got a thousand folders {root}/{name}-{time}*, expected a free name: give --output-dir")


def _is_fresh(folder: Path) -> bool:
    """Whether it holds nothing but what a run left that was killed before it began."""
    return folder.is_dir() and all(
        file.name == LOCK or file.name.startswith(TEMPORARY_PREFIX) for file in folder.iterdir()
    )


def _make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --output-dir") from None


def _draw_seeds(entry: Request) -> Request:
    """The entry with every prompt's seed in `random_seed`, those drawn now and those given."""
    seeds = tuple(draw_seed() if seed == -1 else seed for *_, seed in entry.per_prompt())
    return replace(entry, sampling=replace(entry.sampling, random_seed=seeds))


def _resume(config: RunConfig, folder: Path, provenance: Mapping[str, Any]) -> RunConfig:
    """The config that the folder was made with, if it is this one."""
    old = load_config(folder / "config.yaml")
    advice = "repeat the run with the same settings, or choose another --output-dir"
    if len(old.entries) != len(config.entries):
        raise UserError(f"got {len(config.entries)} entries, but {folder} was made with {len(old.entries)}: {advice}")
    for before, now in zip(old.entries, config.entries, strict=True):
        for group in group_classes():
            a, b = getattr(before, group), getattr(now, group)
            for name in vars(a or b) if a != b else ():
                was, wanted = getattr(a, name, None), getattr(b, name, None)
                chosen = group == "memory" and (name == "max" or f"memory.{name}" not in now.spelled)
                if was != wanted and not chosen and not (name == "random_seed" and not wanted):
                    option = called(now, f"{group}.{name}")
                    where = f"entry {now.output.name}: {option}"
                    raise UserError(f"{where}: got {wanted!r}, but {folder} was made with {was!r}: {advice}")
    if (dtype := old.provenance.get("dtype")) != provenance["dtype"]:
        raise UserError(f"got dtype {provenance['dtype']}, but {folder} was made with {dtype}: {advice}")
    return old
