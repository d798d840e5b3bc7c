"""Weight files as state dicts: safe reading with a diagnosis for what is not a weight file, atomic writing, hashes."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from animatediff.utils import UserError, replacing

StateDict = dict[str, Tensor]

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth")
INDEX_SUFFIX = ".json"  # of a sharded model: "x.safetensors.index.json", "x.bin.index.json"
WRAPPERS = ("state_dict", "controlnet")  # entries under which training code puts the weights, possibly nested

# Classes that pickles of training runs mention beside the weights. They are read as empty stand-ins: nothing of
# theirs is imported or run. Any other class is refused.
BOOKKEEPING_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# Containers of torch that early textual inversions are saved in.
SAFE_CLASSES = (torch.nn.ParameterDict,)
# What torch.load raises on a damaged pickle, depending on where the damage is.
PICKLE_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class LoadedFile:
    """A weight file, its wrappers removed. Tensors are on the CPU and memory-mapped where the format allows."""

    path: Path
    tensors: StateDict
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()


def read_state_dict(path: str | Path) -> LoadedFile:
    """Read `.safetensors`, `.ckpt`, `.pt`, `.pth`, `.bin` (told apart by content) or a sharded model's index.

    Nothing in the file is executed. Wrappers (`state_dict`, `controlnet`), entries that are not tensors and the
    prefixes of DDP and torch.compile (`module.`, `_orig_mod.`) are removed and noted.

    Raises:
        UserError: the file is missing, damaged, no weight file at all, or would have to execute code.
    """
    path = Path(path)
    _check_readable(path)
    if path.suffix == INDEX_SUFFIX:
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(512)
    if _looks_like_safetensors(head):
        tensors, metadata = _read_safetensors(path)
        notes: list[str] = []
    else:
        _refuse_other_content(head, path)
        tensors, metadata, notes = _unwrap(_read_pickle(path), path)
    tensors, stripped = _strip_wrapper_prefixes(tensors)
    if not tensors:
        raise UserError(f"got {path} without a single tensor, expected weights: choose another file")
    return LoadedFile(path, tensors, metadata, (*notes, *stripped))


def write_state_dict(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    wrapper: str = "state_dict",
) -> Path:
    """Write tensors under a temporary name, then rename: a reader sees the old file or the whole new one.

    Args:
        path: `.safetensors`, or `.ckpt`, `.pt`, `.pth` (a pickle of `{wrapper: tensors, "metadata": metadata}`).
        tensors: any device and layout; written contiguous, in their dtype.
        metadata: strings that travel with the file.
        wrapper: one of WRAPPERS.

    Raises:
        UserError: another suffix, or a folder that cannot be written to.
    """
    path, metadata = Path(path), dict(metadata or {})
    plain = _written_apart(tensors)
    if path.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        suffixes = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
        raise UserError(f"got {path} to write to, expected a name ending in {suffixes}: rename it")
    pickled = path.suffix in PICKLE_SUFFIXES
    if pickled:  # clones: a view into a memory-mapped file would drag the whole file into the pickle
        plain = {key: tensor.clone() for key, tensor in plain.items()}
    with replacing(path) as temporary:
        try:
            if pickled:
                torch.save({wrapper: plain, "metadata": metadata}, temporary)
            else:
                save_file(plain, temporary, metadata={"format": "pt", **metadata})
                temporary.chmod(0o666 & ~_umask())  # not for the owner alone
        except (SafetensorError, RuntimeError) as error:  # what the two make of a full disk
            raise OSError(_first_line(str(error))) from None
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _written_apart(tensors: Mapping[str, Tensor]) -> StateDict:
    """Contiguous CPU tensors; of several names for one tensor, as pickles may have them, all but one are copies."""
    plain: StateDict = {}
    seen = set()
    for key, tensor in tensors.items():
        plain[key] = tensor.detach().cpu().contiguous()
        if (place := plain[key].data_ptr()) in seen:
            plain[key] = plain[key].clone()
        seen.add(place)
    return plain


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file; of a folder, the hash of its weight files' names and hashes.

    Remembered within the process for as long as size and modification time stay the same.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (SAFETENSORS_SUFFIX, ".bin", *PICKLE_SUFFIXES))
        lines = "".join(f"{file_sha256(p)}  {p.relative_to(path).as_posix()}\n" for p in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    stat = path.stat()
    return _file_sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def strip_prefix(tensors: StateDict, prefix: str) -> StateDict:
    """The state dict without `prefix`, if every key starts with it; unchanged otherwise."""
    if tensors and all(key.startswith(prefix) for key in tensors):
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, such as a diffusers config.json.

    Raises:
        UserError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"got no {path.name} in {path.parent}, expected one: restore it from the original model")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise UserError(f"got {path} holding a {type(content).__name__}, expected a JSON object: fetch the file again")
    return content


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON from a file of someone else's.

    Raises:
        UserError: it is broken, or nested deeper than anything real.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"got {where} with broken content ({error}), expected JSON: fetch the file again") from None


def find_weights(folder: Path, stem: str, pickle_stem: str) -> Path | None:
    """The weight file of one part of a diffusers folder; whole precision before fp16, safetensors before pickles.

    Args:
        folder: such as `unet/`.
        stem: name of the `.safetensors` file without suffix, such as `diffusion_pytorch_model`.
        pickle_stem: the same of the `.bin` file.
    """
    names: list[str] = []
    for variant in ("", ".fp16"):
        for base, suffix in ((stem, ".safetensors"), (pickle_stem, ".bin")):
            names += [
                f"{base}{variant}{suffix}",
                f"{base}{suffix}.index{variant}.json",
                f"{base}{variant}{suffix}.index.json",
            ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


# --- reading ---------------------------------------------------------------------------------------------------------


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise UserError(f"got {path}, expected a weight file: there is no such file")
    if path.is_dir():
        raise UserError(f"got {path}, expected a weight file: it is a folder")
    if not os.access(path, os.R_OK):
        raise UserError(f"got {path}, expected a readable file: its permissions forbid reading")
    if path.stat().st_size == 0:
        raise UserError(f"got {path}, expected weights: the file is empty; download it again")


def _looks_like_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    _check_safetensors_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        reason = _first_line(str(error))
        raise UserError(f"got a damaged safetensors file, {path} ({reason}): download it again") from None


def _check_safetensors_size(path: Path) -> None:
    """Compare what the header announces with what is there; the library's own message would not say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = struct.unpack("<Q", file.read(8))[0]
        header_bytes = file.read(header_size)
    truncated = f"got a truncated safetensors file, {path}: %s bytes announced, {size} there; download it again"
    if len(header_bytes) < header_size:
        raise UserError(truncated % f"at least {8 + header_size}")
    try:
        header = json.loads(header_bytes)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"got a damaged safetensors header in {path}: download the file again") from None
    if size < expected:
        raise UserError(truncated % expected)
    if size > expected:
        raise UserError(f"got {path} with {size} bytes, expected {expected} by its header: download it again")


def _refuse_other_content(head: bytes, path: Path) -> None:
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    what = None
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"got a Git-LFS pointer, not weights, in {path}: run `git lfs pull` or download the file")
    if text.startswith(b"<"):  # as no pickle does
        what = "an HTML page (a login or error page of the download site)"
    elif text.startswith((b"{", b"[")):
        what = "a JSON document"
    elif all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        what = f"plain text ({head[:40].decode().splitlines()[0]!r})"
    if what:
        raise UserError(f"got {what}, not weights, in {path}: download the file again")
    if path.suffix == SAFETENSORS_SUFFIX and head[:2] not in (b"PK", b"\x80\x02"):
        raise UserError(f"got {path}, expected safetensors: its header is damaged; download the file again")


def _read_pickle(path: Path) -> Any:
    """torch.load without code execution; bookkeeping of training runs comes as empty stand-ins."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise UserError(f"got a TorchScript program, not weights, in {path}: it is code; use a .safetensors release")
    stand_ins = [_stand_in(name) for name in BOOKKEEPING_CLASSES]
    try:
        with torch.serialization.safe_globals([*stand_ins, *SAFE_CLASSES]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except PICKLE_ERRORS as error:
        raise UserError(_pickle_diagnosis(path, is_zip, error)) from None


def _stand_in(name: str) -> type:
    module, _, qualname = name.rpartition(".")

    def ignore(self: object, *args: object) -> None:
        return None

    members: dict[str, Callable | str] = {"__module__": module, "__init__": ignore, "__setstate__": ignore}
    members["__new__"] = lambda cls, *args: object.__new__(cls)
    return type(qualname, (), members)


def _pickle_diagnosis(path: Path, is_zip: bool, error: BaseException) -> str:
    text = str(error)
    if name := re.search(r"(?:GLOBAL|unrecognized function) ([\w.]+)", text):
        return (
            f"got {path}, which would execute code while loading ({name[1]}), expected tensors only: "
            "refused because it can do harm; use a .safetensors release of the model"
        )
    with path.open("rb") as file:
        is_zip_start = file.read(2) == b"PK"
    if is_zip:
        return f"got a zip archive that holds no readable torch weights, {path}: {_first_line(text)}"
    if is_zip_start:
        return f"got a truncated or damaged torch file, {path}: its zip archive has no end; download it again"
    return f"got {path}, expected .safetensors or a torch pickle: damaged or of another kind; download it again"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:160] if text.strip() else "unknown content"


def _unwrap(content: Any, path: Path) -> tuple[StateDict, dict[str, str], list[str]]:
    notes, metadata = [], {}
    while isinstance(content, Mapping):
        if isinstance(extra := content.get("metadata"), Mapping):
            metadata |= {str(k): v for k, v in extra.items() if isinstance(v, str)}
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        notes.append(f"unwrapped {wrapper!r}")
        content = content[wrapper]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"got {path} holding a {kind}, expected named tensors: save the module's state_dict() instead")
    if not any(isinstance(value, Tensor) for value in content.values()):
        content = _flatten(content)
    dropped = [str(key) for key, value in content.items() if not isinstance(value, Tensor) and key != "metadata"]
    if dropped:
        notes.append(f"left out {len(dropped)} entries that are no tensors: {', '.join(dropped[:8])}")
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}, metadata, notes


def _flatten(groups: Mapping) -> dict[str, Any]:
    """Files of several state dicts (IP-Adapter, CameraCtrl, textual inversions): one level of names, dotted."""
    flat: dict[str, Any] = {}
    for name, group in groups.items():
        group = dict(group.named_parameters()) if isinstance(group, torch.nn.ParameterDict) else group
        flat |= (
            {f"{name}.{key}": value for key, value in group.items()} if isinstance(group, Mapping) else {name: group}
        )
    return flat


def _strip_wrapper_prefixes(tensors: StateDict) -> tuple[StateDict, list[str]]:
    notes = []
    if any("_orig_mod." in key for key in tensors):
        tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}
        notes.append("removed `_orig_mod.` of torch.compile")
    if (plain := strip_prefix(tensors, "module.")) is not tensors:
        tensors = plain
        notes.append("removed the prefix `module.` of distributed training")
    return tensors, notes


def _read_shards(index: Path) -> LoadedFile:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"got {index}, expected the index of a sharded model: it has no weight_map")
    tensors: StateDict = {}
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(
                f"got {index} without its part {name}, expected {len(names)} parts: download what is missing"
            )
        tensors |= read_state_dict(index.parent / name).tensors
    if missing := weight_map.keys() - tensors.keys():
        raise UserError(f"got parts of {index} without {len(missing)} tensors it lists, such as {min(missing)}")
    return LoadedFile(index, tensors, {}, (f"joined {len(names)} parts",))
