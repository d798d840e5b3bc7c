"""Weight files found by their name or by their hash: in `models/`, and among those that the repository brings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from animatediff.checkpoints.files import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, file_sha256, read_safetensors_metadata
from animatediff.checkpoints.hashes import LARGEST_LORA, file_hashes
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.known_files import REPOSITORY, find_file
from animatediff.config.values import LORA_FILE
from animatediff.utils import UserError, describe

SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
MOST_FILES = 100_000
DIFFUSERS_INDEX = "model_index.json"  # of a model that is a folder


def model_folders() -> list[Path]:
    """Where files are looked for."""
    folders = (Path("models"), REPOSITORY / "models", REPOSITORY / "animatediff" / "assets")
    return list({folder.resolve(): folder for folder in reversed(folders) if folder.is_dir()}.values())[::-1]


def model_files(beside: Path | None = None) -> list[Path]:
    """All weight files there, sorted within each folder, those of the folder `beside` (not below it) last."""
    found = [path for folder in model_folders() for path in sorted(_walk(folder)) if path.suffix.lower() in SUFFIXES]
    if beside is not None and beside.is_dir():
        found += sorted(path for path in beside.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links too, each folder once."""
    seen, count = set(), 0
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if (path := Path(place, name)).is_file():  # no pipe, no broken link
                count += 1
                yield path
            if count >= MOST_FILES:
                return


def as_option(path: Path) -> str:
    """A path as configs name it: what belongs to the repository is found from anywhere."""
    inside = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
    return str(inside if find_file(str(inside)) == path else path)


# ---- by name --------------------------------------------------------------------------------------------------


def named(name: str, files: Sequence[Path]) -> list[Path]:
    """Files of a name: with as many folders as are given, with or without its ending, in capitals or not."""
    parts = [part.lower() for part in re.split(r"[\\/]", name) if part not in ("", ".")]
    if not parts or ".." in parts:
        return []
    with_ending = Path(parts[-1]).suffix in SUFFIXES

    def matches(path: Path) -> bool:
        own = [part.lower() for part in path.parts]
        own[-1] = own[-1] if with_ending else path.stem.lower()
        return own[-len(parts) :] == parts

    return [path for path in files if matches(path)]


def find_lora(name: str) -> Path:
    """The LoRA of a name: that of its file, or else the one that its trainer noted in it.

    Raises:
        UserError: there is none, with the nearest names; or several different ones.
    """
    files = model_files()
    found = named(name, files) or [path for path in files if _output_name(path) == name]
    if not found:
        known = {path.stem.lower(): path.stem for path in files}
        near = difflib.get_close_matches(re.split(r"[\\/]", name)[-1].lower()[:100], known, n=3)
        hint = f"the nearest are {', '.join(known[n] for n in near)}" if near else "put its file there"
        raise UserError(f"there is no LoRA {describe(name)} under {_places()}: {hint}")
    if len(found) > 1:
        loras = [path for path in found if _is_lora(path)] or found
        found = list({file_sha256(path): path for path in reversed(loras)}.values())[::-1]
    if len(found) > 1:
        listed = ", ".join(map(str, found[:3]))
        raise UserError(f"got LoRA {describe(name)}, which may be {listed}: name its folder, too, as in folder/{name}")
    return found[0]


def _is_lora(path: Path) -> bool:
    try:
        return identify(path).kind in LORA_FILE.kinds
    except UserError:
        return False


def _output_name(path: Path) -> str:
    if path.suffix != SAFETENSORS_SUFFIX or path.stat().st_size > LARGEST_LORA:
        return ""
    return read_safetensors_metadata(path).get("ss_output_name", "")


def _places() -> str:
    return " and ".join(str(f) for f in model_folders() if f.name == "models") or f"{Path.cwd() / 'models'}"


# ---- by hash --------------------------------------------------------------------------------------------------


def with_digits(digits: str, name: str, files: Sequence[Path], *, largest: int | None = None) -> Path | None:
    """The file that another program knows by some digits of a hash: those of its name are looked at first.

    Args:
        digits: at least 8 hex digits (`Hashes.match`).
        largest: bytes; larger files are passed over.
    """
    first = named(name, files)
    rest = [path for path in files if path not in first and not (largest and path.stat().st_size > largest)]
    return next((path for path in _hashing([*first, *rest], name) if _known_by(path, digits)), None)


def _known_by(path: Path, digits: str) -> bool:
    """By its hash, or by that which its trainer noted (kohya's `sshs_model_hash`), whoever has rewritten it since."""
    noted = read_safetensors_metadata(path).get("sshs_model_hash", "") if path.suffix == SAFETENSORS_SUFFIX else ""
    return file_hashes(path).match(digits) or noted.lower().startswith(digits.lower())


def with_sha256(sha256: str, path: Path, beside: Path | None) -> Path | None:
    """A file, or a diffusers folder, of this very content, wherever it was moved to and whatever it is called now.

    Args:
        path: where it was.
        beside: a folder that is looked in, too.
    """
    if path.suffix.lower() not in SUFFIXES:
        folders = [f for place in model_folders() for f in sorted(_walk(place)) if f.name == DIFFUSERS_INDEX]
        candidates = [file.parent for file in folders]
    else:
        candidates = [file for file in model_files(beside) if file.suffix == path.suffix]
    candidates.sort(key=lambda file: file.name != path.name)
    return next((file for file in _hashing(candidates, path.name) if file_sha256(file) == sha256), None)


def _hashing(files: list[Path], name: str) -> Iterator[Path]:
    """Files one by one; who waits for long is told why."""
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, desc=f"looking for {name[:60]} by its hash", unit="B", unit_scale=True, delay=2) as bar:
        for path in files:
            yield path
            bar.update(path.stat().st_size)
