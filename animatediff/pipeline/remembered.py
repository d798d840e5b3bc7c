"""Any file that says how a clip was made, as a config: a YAML, a run's folder, a clip of ours or of another program."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from animatediff.checkpoints.files import file_sha256
from animatediff.checkpoints.find_models import as_option, model_files, named, with_digits, with_sha256
from animatediff.checkpoints.hashes import LARGEST_LORA, file_hashes
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.known_files import REPOSITORY, find_file, missing_file
from animatediff.config.clip_formats import FPS_LIMITS, LOOPING
from animatediff.config.comfy_prompt import read_prompt
from animatediff.config.foreign_settings import ForeignSettings, WantedFile
from animatediff.config.infotext import read_infotext
from animatediff.config.prompt_yaml import RunConfig, config_from, load_config
from animatediff.config.request import Request
from animatediff.config.settings import listed
from animatediff.config.spellings import NamedFile, all_options, as_values, build_request, files, flat_names, usual
from animatediff.features.inputs import input_sha256
from animatediff.media.comments import MAX_LENGTH
from animatediff.media.video import PICTURE_SUFFIXES, VIDEO_SUFFIXES, list_pictures, read_metadata, read_texts
from animatediff.pipeline.run_folder import is_ours, run_name, settings_request
from animatediff.utils import UserError, naming

CLIP_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, ".gif", ".apng")
TEXT_SUFFIXES = (".txt", ".json")  # an infotext or a ComfyUI prompt by itself; else a YAML
MOST_TOLD = 12  # things without a counterpart that the warning lists


@dataclass(frozen=True)
class Remembered:
    """What a clip's own file says of how it was made.

    Attributes:
        program: that made it.
        values: of options, in groups or by `group.name`.
        hashes: path -> SHA-256 of the files that were used, as far as the clip tells.
        made_on: device and dtype, as far as the clip tells.
        foreign: what another program's settings say beyond our options.
    """

    program: str
    values: dict[str, Any]
    hashes: dict[str, str] = field(default_factory=dict)
    made_on: dict[str, str] = field(default_factory=dict)
    foreign: ForeignSettings | None = None

    def request(self) -> Request:
        """Raises: UserError for values that no option takes."""
        return build_request(self.values, where="", check=False)

    def wanted(self) -> list[WantedFile]:
        """Files that another program names."""
        return self.foreign.wanted if self.foreign else []


class SeveralClips(UserError):
    """A file that shows clips side by side: it has no settings of its own."""


def load_run(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, complete: bool = True
) -> tuple[RunConfig, list[str]]:
    """The config in a YAML, a run's folder, a clip of ours, or a picture or clip of AUTOMATIC1111 or ComfyUI.

    Files are the very ones that the clip or the run was made with: one that was moved is found by its hash.

    Args:
        path, overrides, complete: as of `load_config`. A file that is named by an override is taken as it is.

    Returns:
        The config, and a line for everything that its maker should know.

    Raises:
        UserError: the file holds no settings, or broken ones; a file has changed, or is not found.
    """
    path, overrides = Path(path), dict(overrides or {})
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    if path.is_dir() and not is_clip(path):
        raise UserError(f"got {path}, a folder without config.yaml or PNG frames, expected a run's folder or a file")
    known = read_remembered(path) if is_clip(path) else None
    if known is None:
        config = load_config(path, overrides, complete=complete)
        if path.name == "config.yaml":
            config = replace(config, name=run_name(path.absolute().parent))
        hashes = config.provenance.get("weights")
        hashes = {str(k): str(v) for k, v in hashes.items()} if isinstance(hashes, dict) else {}
        return found_again(config, hashes, path.parent, overrides)
    values, notes = known.values, []
    if known.foreign:
        values, notes = _ours(known.foreign, path, _given(overrides))
    config = config_from([values], str(path), name=path.stem, overrides=overrides, complete=complete)
    config = replace(config, provenance=known.made_on)
    config, moved = found_again(config, known.hashes, path.parent, overrides)
    return config, [*notes, *moved]


def is_clip(path: Path) -> bool:
    """A picture, a video, a folder of PNG frames, or a text file of another program's settings; by the name alone."""
    if path.is_dir():
        return any(path.glob("*.png"))
    return path.suffix.lower() in CLIP_SUFFIXES or _says_how(path) is not None


def _says_how(path: Path) -> ForeignSettings | None:
    if path.suffix.lower() not in TEXT_SUFFIXES or not path.is_file() or path.stat().st_size > MAX_LENGTH:
        return None
    return _foreign([path.read_text(encoding="utf-8", errors="replace")])


def read_remembered(path: Path) -> Remembered:
    """What the file of a clip says; a PNG folder's first frame, or a text file of another program, do as well.

    Raises:
        UserError: it says nothing of the kind, or cannot be read.
    """
    if foreign := _says_how(path):
        return Remembered(foreign.program, foreign.values, foreign=foreign)
    settings = read_metadata(path)
    if isinstance(settings.get("prompts"), list):
        raise SeveralClips(f"got {path}, which shows several clips side by side: name the file of one of them")
    if is_ours(settings):
        made_on = {key: settings[key] for key in ("device", "dtype") if isinstance(settings.get(key), str)}
        version = settings.get("animatediff")
        program = f"animatediff {version}" if isinstance(version, str) else "animatediff"
        return Remembered(program, settings_request(settings), _hashes_in(settings), made_on)
    texts = read_texts(path)
    if foreign := _foreign(texts.values()):
        return Remembered(foreign.program, foreign.values, foreign=foreign)
    if any('"last_node_id"' in text or '"class_type"' in text for text in texts.values()):
        raise UserError(
            f"got {path} with a ComfyUI workflow of which the sampler is not known here: write its settings as options "
            "(scripts/animate.py --help)"
        )
    raise UserError(f"got {path}, which holds no settings, expected a clip made by us, by AUTOMATIC1111 or by ComfyUI")


def _hashes_in(settings: Mapping[str, Any]) -> dict[str, str]:
    """path -> SHA-256, of `files` or, before there were groups, beside the options."""
    named_files = settings.get("files")
    entries = (named_files if isinstance(named_files, dict) else settings).values()
    pairs = [(e.get("path"), e.get("sha256")) for e in entries if isinstance(e, dict)]
    return {path: sha256 for path, sha256 in pairs if isinstance(path, str) and isinstance(sha256, str)}


def _given(overrides: Mapping[str, Any]) -> set[str]:
    """The options, or groups, that overrides name."""
    known = {**flat_names(), **all_options()}
    return {known[key].dotted if key in known else key for key in overrides}


def _names(given: set[str], option: str) -> bool:
    return any(option == name or option.startswith((f"{name}.", f"{name}[")) for name in given)


# ---- other programs -------------------------------------------------------------------------------------------


def _foreign(texts: Iterable[str]) -> ForeignSettings | None:
    """Of a ComfyUI prompt, or else of its workflow, or else of an infotext, among some texts."""
    texts = sorted((text for text in texts if len(text) <= MAX_LENGTH), key=lambda text: '"class_type"' not in text)
    graphs = (read_prompt(graph) for text in texts for graph in _graphs(text))
    return next((found for found in (*graphs, *(read_infotext(text) for text in texts)) if found), None)


def _graphs(text: str) -> Iterator[str]:
    """Where ComfyUI and its video nodes put a graph: by itself, behind its name, or under it in a JSON object."""
    text = re.sub(r"^\s*(prompt|workflow):", "", text).strip()
    if not text.startswith("{"):
        return
    yield text
    try:
        whole = json.loads(text)
        inner = [whole.get(name) for name in ("prompt", "workflow")]
    except (ValueError, RecursionError, AttributeError):
        return
    yield from (
        graph if isinstance(graph, str) else json.dumps(graph) for graph in inner if isinstance(graph, (str, dict))
    )


def _ours(foreign: ForeignSettings, path: Path, given: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Values for a config, with the files that are wanted found; and one line of what has no counterpart."""
    values = dict(foreign.values)
    form = path.suffix[1:].lower()
    values["output.format"] = form if form in FPS_LIMITS and form != "png" else "gif"
    if values["output.format"] not in LOOPING:
        values.pop("output.loop_count", None)
    if _names(given, "model.motion_module"):
        values.pop("size.num_frames", None) if values.get("size.num_frames") == 1 else None
    missing: list[str] = []
    everything = model_files(path.parent)
    for wanted in foreign.wanted:
        if _names(given, wanted.option):
            continue
        try:
            file = as_option(_find(wanted, everything))
        except UserError as error:
            missing.append(f"{path}: {error}")
            continue
        if wanted.option in ("model.loras", "model.motion_loras"):
            scale = 1.0 if wanted.scale is None else wanted.scale
            values.setdefault(wanted.option, []).append({"path": file, "scale": scale})
        elif wanted.option == "model.embeddings":
            word = Path(re.split(r"[\\/]", wanted.name)[-1])
            name = word.stem if word.suffix in (".pt", ".bin", ".safetensors") else word.name
            values.setdefault(wanted.option, []).append({"path": file, "name": name})
        else:
            values[wanted.option] = file
    if missing:
        raise UserError(listed(missing))
    told = "; ".join(foreign.without[:MOST_TOLD])
    more = len(foreign.without) - MOST_TOLD
    told += f"; and {more} more" if more > 0 else ""
    told = f"; no counterpart here: {told}" if told else ""
    return values, [f"{path}: settings of {foreign.program}, whose noise is another: not the same pictures{told}"]


def _find(wanted: WantedFile, everything: list[Path]) -> Path:
    """Raises: UserError that names the file and the option which may name another one."""
    of_name = named(wanted.name, everything)
    largest = LARGEST_LORA if wanted.option in ("model.loras", "model.embeddings") else None
    if wanted.digits:
        found = with_digits(wanted.digits, wanted.name, everything, largest=largest)
    else:
        found = of_name[0] if len({file_hashes(path).sha256 for path in of_name}) == 1 else None
    if found:
        return found
    option = usual(wanted.option)
    none = "" if wanted.option == "model.base" else f', or {option}="" for none'
    way_out = f"or name a file by {option}=…{none}"
    if len(of_name) > 1 and not wanted.digits:
        raise UserError(f"got {wanted.name}, which may be {' or '.join(map(str, of_name[:3]))}: name one by {option}=…")
    hashed = f" (hash {wanted.digits})" if wanted.digits else ""
    if of_name:
        got = file_hashes(of_name[0]).sha256[:10]
        raise UserError(
            f"needs {wanted.name}{hashed}, got {of_name[0]} with hash {got}: put the right one there, {way_out}"
        )
    raise UserError(f"needs {wanted.name}{hashed}, which is not under models/: put it there, {way_out}")


# ---- our own --------------------------------------------------------------------------------------------------


def found_again(
    config: RunConfig, hashes: Mapping[str, str], beside: Path, overrides: Mapping[str, Any]
) -> tuple[RunConfig, list[str]]:
    """The config with every file at the place where its content is now.

    Args:
        hashes: path -> SHA-256, of the files that an earlier run used.
        beside: a folder where files are looked for, too.
        overrides: files of options that these name are taken as they are.

    Raises:
        UserError: files that have changed or that are nowhere, all of them.
    """
    given = _given(overrides)
    entries, notes, mistakes = [], [], []
    for entry in config.entries if hashes else ():
        moved: dict[str, str] = {}
        for option, file in files(entry).items():
            sha256 = _recorded(file.path, hashes)
            if sha256 is None or _names(given, option):
                continue
            try:
                with naming(f"entry {entry.output.name}: {file.called}"):
                    place = place_now(file, sha256, beside)
            except UserError as error:
                mistakes.append(str(error))
                continue
            if place is not None:
                moved[option] = as_option(place)
                notes.append(f"{file.called}: {file.path} is now {moved[option]} (the same SHA-256)")
        entries.append(_with_files(entry, moved))
    if mistakes:
        raise UserError(listed(mistakes))
    return (replace(config, entries=tuple(entries)) if hashes else config), list(dict.fromkeys(notes))


def _recorded(path: str, hashes: Mapping[str, str]) -> str | None:
    """Of a file as an option names it; runs record files of the repository by their whole path."""
    if path in hashes:
        return hashes[path]
    if str(REPOSITORY / path) in hashes:
        return hashes[str(REPOSITORY / path)]
    parts = Path(path).parts
    return next((h for known, h in hashes.items() if Path(known).parts[-len(parts) :] == parts), None)


def file_digest(file: NamedFile, path: Path) -> str:
    """The SHA-256 that a run records of a file, or of a folder, that an option names."""
    return file_sha256(path) if file.kind.kinds else input_sha256(path)


def place_now(file: NamedFile, sha256: str, beside: Path) -> Path | None:
    """Where the file with a hash is now; None if it is where it was.

    Raises:
        UserError: it is nowhere.
    """
    there = find_file(file.path)
    if there and not _has_content(file, there):
        return None  # a device, or just any folder: whoever opens it says so
    got = file_digest(file, there) if there else ""
    if got == sha256:
        return None
    near = beside / Path(file.path).name
    if near.exists() and _has_content(file, near) and file_digest(file, near) == sha256:
        return near
    if file.kind.kinds and (found := with_sha256(sha256, Path(file.path), beside)):
        return found
    where = "under models/" if file.kind.kinds else f"called so in {beside}"
    expected = f"hash {sha256[:10]}, which no file {where} has"
    if there:
        raise UserError(
            f"got {there} with hash {got[:10]}, expected {expected}: put the one of then back, or name one by "
            f"{usual(file.option.partition('[')[0])}=…"
        )
    raise UserError(f"{missing_file(file.path)} (expected {expected})")


def _has_content(file: NamedFile, path: Path) -> bool:
    """Whether it is a file, or a folder of what belongs there: a stranger's clip may name anything, such as `/`."""
    if path.is_file():
        return True
    try:
        return path.is_dir() and bool(identify(path) if file.kind.kinds else list_pictures(path))
    except UserError:
        return False


def _with_files(request: Request, moved: Mapping[str, str]) -> Request:
    """The same request with other paths, by option as of `files`."""
    if not moved:
        return request
    values: Any = as_values(request, changed_only=True)
    for option, path in moved.items():
        *steps, last = [int(step) if step.isdecimal() else step for step in re.findall(r"[^.\[\]]+", option)]
        place = values
        for step in steps:
            place = place[step]
        place[last] = path
    return replace(build_request(values, where="", check=False), spelled=request.spelled)
