"""Weight files as state dicts: safe reading with a diagnosis for what is not a weight file, atomic writing, hashes."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from animatediff.checkpoints.hashes import file_hashes
from animatediff.checkpoints.keymaps import with_unet_prefix
from animatediff.checkpoints.pickles import first_line, read_pickle
from animatediff.checkpoints.weight_checks import check_keys, check_tensors, dequantised
from animatediff.utils import UserError, naming, replacing

StateDict = dict[str, Tensor]

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
DTYPE_NAMES = {  # of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LONGEST_INDEX = 1000  # parts of a model
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
INDEX_SUFFIX = ".json"  # of a sharded model: "x.safetensors.index.json", "x.bin.index.json"
_contents = ContextVar("contents", default=True)  # whether weights are read, see `without_contents`


@dataclass(frozen=True)
class LoadedFile:
    """A weight file, its wrappers removed. Tensors are on the CPU and memory-mapped where the format allows."""

    path: Path
    tensors: StateDict
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()


@contextmanager
def without_contents() -> Iterator[None]:
    """Within, files give names, types and shapes alone: tensors are on the meta device, and hashes are empty.

    Single numbers, such as a LoRA's alpha, and whole numbers, such as indices, are read: checks depend on them.
    """
    token = _contents.set(False)
    try:
        yield
    finally:
        _contents.reset(token)


def read_state_dict(path: str | Path) -> LoadedFile:
    """Read `.safetensors`, `.ckpt`, `.pt`, `.pth`, `.bin` (told apart by content) or a sharded model's index.

    Nothing in the file is executed. Wrappers (`state_dict`, `controlnet`), entries that are not tensors and the
    prefixes of DDP and torch.compile (`module.`, `_orig_mod.`) are removed and noted; a UNet alone in LDM keys gets the
    prefix that it has in a whole model.

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
        tensors, metadata, notes = read_pickle(path)
    if not tensors:
        raise UserError(f"got {path} without a single tensor, expected weights: choose another file")
    with naming(path):
        check_keys(tensors)
        check_tensors(tensors, path.stat().st_size)
        if not _contents.get():
            tensors = {k: t.to("meta") if t.is_floating_point() and t.numel() > 1 else t for k, t in tensors.items()}
        tensors, scaled = dequantised(tensors)
    tensors, stripped = _strip_wrapper_prefixes(tensors)
    return LoadedFile(path, tensors, metadata, (*notes, *scaled, *stripped))


def write_state_dict(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    wrapper: str | None = "state_dict",
) -> Path:
    """Write tensors under a temporary name, then rename: a reader sees the old file or the whole new one.

    Args:
        path: `.safetensors`, or a pickle of `{wrapper: tensors, "metadata": metadata}`: `.ckpt`, `.pt`, `.pth`, `.bin`.
        tensors: any device and layout; written contiguous, in their dtype.
        metadata: strings that travel with the file.
        wrapper: one of `pickles.WRAPPERS`; None: a pickle has a dictionary for each first part of the keys, and
            metadata only where there are any.

    Raises:
        UserError: another suffix, or a folder that cannot be written to.
    """
    path, metadata = Path(path), dict(metadata or {})
    plain = _written_apart(tensors)
    if path.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        suffixes = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
        raise UserError(f"got {path} to write to, expected a name ending in {suffixes}: rename it")
    with replacing(path) as temporary:
        if path.suffix == SAFETENSORS_SUFFIX:
            _write_safetensors(temporary, plain, {"format": "pt", **metadata})
        else:  # clones: a view into a memory-mapped file would drag the whole file into the pickle
            plain = {key: tensor.clone() for key, tensor in plain.items()}
            content = {wrapper: plain, "metadata": metadata} if wrapper else _nested(plain, metadata)
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(first_line(str(error))) from None
    return path


def _nested(tensors: StateDict, metadata: Mapping[str, str]) -> dict[str, Mapping]:
    told = {name: value for name, value in metadata.items() if name != "format"}  # which is safetensors' own
    content: dict[str, dict] = {"metadata": told} if told else {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        content.setdefault(group, {})[name] = tensor
    return content


def _write_safetensors(path: Path, tensors: StateDict, metadata: Mapping[str, str]) -> None:
    """The format of safetensors (https://github.com/huggingface/safetensors), in an order that is always the same.

    The library itself writes metadata in the order of a hash table: the same weights would have another hash each time.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].itemsize, key))  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].nbytes
        name = DTYPE_NAMES[tensors[key].dtype]
        header[key] = {"dtype": name, "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            file.write(tensors[key].reshape(-1).view(torch.uint8).numpy())


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
    """Hex SHA-256 of a file; of a folder, the hash of its weight files' names and hashes. Remembered (`hashes`)."""
    path = Path(path)
    if not _contents.get():
        return ""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
        lines = "".join(f"{file_sha256(p)}  {p.relative_to(path).as_posix()}\n" for p in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    return file_hashes(path).sha256


def begin_hashing(path: str | Path) -> None:
    """Let a thread compute what `file_sha256` will be asked for: a file that is read meanwhile leaves the disk once."""

    def hash_file() -> None:
        with suppress(OSError):  # who asks will be told
            file_sha256(path)

    if _contents.get():
        threading.Thread(target=hash_file, daemon=True).start()


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; its tensors are not looked at. Empty where there is nothing to read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        return {str(k): v for k, v in header["__metadata__"].items() if isinstance(v, str)}
    except (OSError, ValueError, RecursionError, struct.error, KeyError, TypeError, AttributeError):
        return {}


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
        what = f"{path}, no file" if path.exists() else f"no {path.name} in {path.parent}"
        raise UserError(f"got {what}, expected one: restore it from the original model")
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
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise UserError(f"got {path}, expected a weight file: there is no such file") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"got {path}, expected a weight file: it is a folder")
    if not stat.S_ISREG(mode):  # to open a named pipe waits for ever
        raise UserError(f"got {path}, expected a weight file: it is a pipe or a device")
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
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = first_line(str(error))
        if "allocate memory" in reason:
            raise MemoryError(reason) from None
        raise UserError(f"got a damaged safetensors file, {path} ({reason}): download it again") from None


def _check_safetensors_size(path: Path) -> None:
    """Compare what the header announces with what is there; the library's own message would not say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = struct.unpack("<Q", file.read(8))[0]
        header_bytes = file.read(min(header_size, LONGEST_HEADER))
    truncated = f"got a truncated safetensors file, {path}: %s bytes announced, {size} there; download it again"
    if header_size > LONGEST_HEADER:
        raise UserError(f"got a damaged safetensors header in {path}: download the file again")
    if len(header_bytes) < header_size:
        raise UserError(truncated % f"at least {8 + header_size}")
    header = parse_json(header_bytes, f"a damaged safetensors header in {path}")
    try:
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        expected = 8 + header_size + max(ends, default=0)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"got a damaged safetensors header in {path}: download the file again") from None
    if size < expected:
        raise UserError(truncated % expected)
    if size > expected:
        raise UserError(f"got {path} with {size} bytes, expected {expected} by its header: download it again")


def _refuse_other_content(head: bytes, path: Path) -> None:
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    what = None
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"got {path}, which is no weight file: a prompt config is for animate.py --config")
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
    if path.suffix == SAFETENSORS_SUFFIX and head[:2] != b"PK" and head[:1] != b"\x80":
        raise UserError(f"got {path}, expected safetensors: its header is damaged; download the file again")


def _strip_wrapper_prefixes(tensors: StateDict) -> tuple[StateDict, list[str]]:
    notes = []
    if any("_orig_mod." in key for key in tensors):
        tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}
        notes.append("removed `_orig_mod.` of torch.compile")
    if (plain := strip_prefix(tensors, "module.")) is not tensors:
        tensors = plain
        notes.append("removed the prefix `module.` of distributed training")
    return with_unet_prefix(tensors), notes


def _read_shards(index: Path) -> LoadedFile:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"got {index}, expected the index of a sharded model: it has no weight_map")
    tensors: StateDict = {}
    names = {value for value in weight_map.values() if isinstance(value, str)}
    for name in sorted(names):
        part = index.parent / name
        if len(names) > LONGEST_INDEX or part.suffix == INDEX_SUFFIX or part.parent != index.parent:
            raise UserError(f"got {index} with the part {name!r}, expected weight files beside it: download it again")
        if not part.is_file():
            raise UserError(
                f"got {index} without its part {name}, expected {len(names)} parts: download what is missing"
            )
        tensors |= read_state_dict(part).tensors
    if missing := weight_map.keys() - tensors.keys():
        raise UserError(f"got parts of {index} without {len(missing)} tensors it lists, such as {min(missing)}")
    return LoadedFile(index, tensors, {}, (f"joined {len(names)} parts",))
