"""Torch's pickles as named tensors: nothing in them is executed, and nothing they say is trusted for sizes."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animatediff.checkpoints.lora_lists import named_motion_lora
from animatediff.utils import UserError

# Entries under which training code puts the weights, possibly nested.
WRAPPERS = ("state_dict", "controlnet", "lora_state_dict")
DEEPEST_WRAPPER = 4

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
# What torch builds without executing code, but no state dict needs: it takes any amount of memory, or holds no weights.
NEEDLESS = re.compile(
    rb"(?<!\w)(bytearray|_rebuild_(?:nested|sparse|meta|q|wrapper|device)\w*"
    rb"|(?:Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Tensor)(?!\w)"
)
LONGEST_SCAN = 1 << 26  # bytes of an old pickle, which has all names in front of the weights
# What torch.load raises on a damaged pickle, depending on where the damage is.
DAMAGE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, ImportError, MemoryError, OSError, struct.error, zipfile.BadZipFile),
)


def read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors of a pickle, its metadata strings, and notes on what was unwrapped or left out.

    Raises:
        UserError: it is damaged, would have to execute code, or holds no named tensors.
    """
    is_zip = _is_zip(path)
    scan = _pickle_in_zip(path) if is_zip else _head(path)
    if needless := NEEDLESS.search(scan):
        raise UserError(
            f"got {path} with a {needless[1].decode()} in it, expected plain tensors: use a .safetensors release"
        )
    stand_ins = [_stand_in(name) for name in BOOKKEEPING_CLASSES]
    try:
        with torch.serialization.safe_globals([*stand_ins, *SAFE_CLASSES]):
            if path.suffix == ".safetensors":  # torch would go by the name
                with path.open("rb") as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except DAMAGE as error:
        raise UserError(_diagnosis(path, is_zip, error)) from None
    return _unwrap(content, path)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript program, which is code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _holds_program(archive)
    except DAMAGE:
        return False


def _holds_program(archive: zipfile.ZipFile) -> bool:
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except DAMAGE:
        return True  # a damaged one, as reading it will tell


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LONGEST_SCAN)


def _pickle_in_zip(path: Path) -> bytes:
    """The pickle of torch's archive, whose parts lie in the file as they are, one after the other.

    Raises:
        UserError: another archive, or one that lies about its parts.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if _holds_program(archive):
                raise UserError(
                    f"got a TorchScript program, not weights, in {path}: it is code; use a .safetensors release"
                )
            packed = any(part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1 for part in parts)
            if packed or sum(part.file_size for part in parts) > size or any(p.header_offset > size for p in parts):
                raise UserError(
                    f"got a zip archive that holds no readable torch weights, {path}: it is packed or damaged"
                )
            name = next((part for part in parts if part.filename.endswith("data.pkl")), None)
            return archive.read(name) if name else b""
    except (*DAMAGE, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        reason = first_line(str(error))
        raise UserError(f"got a zip archive that holds no readable torch weights, {path}: {reason}") from None


def _stand_in(name: str) -> type:
    module, _, qualname = name.rpartition(".")

    def ignore(self: object, *args: object) -> None:
        return None

    members: dict[str, Callable | str] = {"__module__": module, "__init__": ignore, "__setstate__": ignore}
    members["__new__"] = lambda cls, *args: object.__new__(cls)
    return type(qualname, (), members)


def _diagnosis(path: Path, is_zip: bool, error: BaseException) -> str:
    text = str(error)
    if name := re.search(r"(?:GLOBAL|unrecognized function) ([\w.]+)", text):
        return (
            f"got {path}, which would execute code while loading ({name[1]}), expected tensors only: "
            "refused because it can do harm; use a .safetensors release of the model"
        )
    with path.open("rb") as file:
        is_zip_start = file.read(2) == b"PK"
    if is_zip:
        return f"got a zip archive that holds no readable torch weights, {path}: {first_line(text)}"
    if is_zip_start:
        return f"got a truncated or damaged torch file, {path}: its zip archive has no end; download it again"
    return f"got {path}, expected .safetensors or a torch pickle: damaged or of another kind; download it again"


def first_line(text: str) -> str:
    """The beginning of a library's message."""
    return text.strip().splitlines()[0][:160] if text.strip() else "unknown content"


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    notes, metadata = [], {}
    if (
        isinstance(content, list)
        and all(isinstance(t, Tensor) for t in content)
        and (named := named_motion_lora(content))
    ):
        content = named
        notes.append("its layers have no names: told by their order and shapes, as MotionDirector writes them")
    entries = _entries(content)
    for _ in range(DEEPEST_WRAPPER):
        if entries is None:
            break
        for key, value in (_entries(entries.get("metadata")) or {}).items():
            if isinstance(value, str):
                metadata[str(key)] = value
        wrapper = next((name for name in WRAPPERS if _entries(entries.get(name)) is not None), None)
        if wrapper is None:
            break
        notes.append(f"unwrapped {wrapper!r}")
        content = entries[wrapper]
        entries = _entries(content)
    if entries is None:
        kind = type(content).__name__
        which = " (as MotionDirector and early LoRA trainers write; its shapes are not our layers')" * (kind == "list")
        raise UserError(
            f"got {path} holding a {kind}{which}, expected named tensors: save the module's state_dict() instead"
        )
    if not any(isinstance(value, Tensor) for value in entries.values()):
        entries = _flatten(entries)
    dropped = [str(key) for key, value in entries.items() if not isinstance(value, Tensor) and key != "metadata"]
    if dropped:
        notes.append(f"left out {len(dropped)} entries that are no tensors: {', '.join(dropped[:8])}")
    return {str(k): v.detach() for k, v in entries.items() if isinstance(v, Tensor)}, metadata, notes


def _entries(content: Any) -> dict[Any, Any] | None:
    """A mapping as a plain dict, whatever its pickle has put in the place of its methods; None for anything else."""
    if isinstance(content, OrderedDict):
        return dict(OrderedDict.items(content))
    if isinstance(content, dict):
        return dict(dict.items(content))
    if isinstance(content, torch.nn.ParameterDict):
        own = vars(content).get("_parameters")
        return dict(own) if isinstance(own, dict) else {}
    return None


def _flatten(groups: Mapping) -> dict[str, Any]:
    """Files of several state dicts (IP-Adapter, CameraCtrl, textual inversions): one level of names, dotted."""
    flat: dict[str, Any] = {}
    for name, group in groups.items():
        entries = _entries(group)
        flat |= {name: group} if entries is None else {f"{name}.{key}": value for key, value in entries.items()}
    return flat
