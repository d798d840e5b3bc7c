"""Errors a user can act on, and the frame every script runs in."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NoReturn

TEMPORARY_PREFIX = ".tmp-"  # of the hidden folders in which files are written before they take their place
LOCK = ".lock"  # in a folder that has a writer


class UserError(ValueError):
    """A mistake in the input. The message says what was got, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        cut = f"{message[:300]}… ({len(message)} characters)" if len(message) > 350 else message
        raise UserError(f"{cut} (--help lists all options)")


def describe(value: Any) -> str:
    """A value as messages show it: short, and as YAML would spell it."""
    if value is None:
        return "no value"
    if isinstance(value, (list, tuple, dict)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def unknown_key(key: Any, known: Sequence[str], *, what: str = "key") -> str:
    """The message for a name that is not known, with the nearest one that is, if any is near."""
    key, lowered = str(key), {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), lowered, n=1) if len(key) <= 60 else []
    if not near:
        few = f" of {', '.join(known)}" if len(known) <= 50 else " (--help lists all)"
        return f"unknown {what} {describe(key)}, expected one{few}: correct or remove it"
    return f"unknown {what} {key!r}, the nearest known one is {lowered[near[0]]!r}: correct or remove it"


def printable(text: str, *, longest: int = 8000) -> str:
    """Text as the console gets it: control characters, and what its encoding lacks, as escapes; the endless is cut."""
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text)} characters)"
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def told(error: Exception) -> str:
    """A mistake as the console gets it; the system's own name a file, however long its name is."""
    return printable(str(error), longest=500 if isinstance(error, OSError) else 8000)


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Let a `UserError` of the block start with the file (or the place) that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; the file or folder written there becomes `path` if the block succeeds.

    A reader sees the old file or the whole new one; a block that fails leaves the old one and nothing else.

    Raises:
        UserError: what the system refuses in the block: no such folder, no permission, no room.
    """
    path = Path(path)
    try:
        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=path.parent, ignore_cleanup_errors=True) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            if path.is_dir() and temporary.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    except OSError as error:
        if error.filename and TEMPORARY_PREFIX not in str(error.filename):
            raise  # of a file that was read
        reason = error.strerror or str(error)
        raise UserError(
            f"got {path} to write to, expected an existing folder with room and permission: {reason}"
        ) from None


def cache_folder() -> Path:
    """Where programs keep for this user what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "animatediff"


def read_cache(name: str) -> dict[str, Any]:
    """What `write_cache` has kept in a file of the cache folder; nothing where it is missing or damaged."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(name: str, entries: dict[str, Any], *, most: int) -> None:
    """Keep the last `most` entries; where nothing can be written, nothing is kept."""
    try:
        file = cache_folder() / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(dict(list(entries.items())[-most:])), encoding="utf-8")
    except (OSError, ValueError, RuntimeError):  # a `UserError` is a ValueError
        return


@contextmanager
def only_writer(folder: Path, *, option: str, work: str) -> Iterator[None]:
    """Have a folder for this process alone, however it ends, cleared of what a killed one left half written.

    Args:
        option: that names the folder, and `work`, what is done in it, for the message.

    Raises:
        UserError: another process has it.
    """
    path = folder / LOCK
    while True:
        file = open(path, "a")  # noqa: SIM115
        if not try_lock(file):
            file.close()
            raise UserError(
                f"got {option} {folder}, in which another {work} is at work, expected a folder of its own: wait for "
                "it, or choose another"
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # whoever had it before removed it meanwhile
    with file:
        try:
            remove_leftovers(folder)
            yield
        finally:
            if os.name == "nt":
                file.close()  # what is open cannot be removed there
            with suppress(OSError):
                path.unlink()


def try_lock(file: IO[Any]) -> bool:
    """Have an open file for this process, however it ends; forked children do not hold it.

    Returns: False where another process has it. Where the file system has no locks, nobody is kept away.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete what `replacing` left in a folder, however deep, when a process was killed; for its only writer."""
    for temporary in [*folder.rglob(f"{TEMPORARY_PREFIX}*/")]:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next allocation, for the rest of the process; whether it could.

    On Linux every large tensor is otherwise new memory that the system clears page by page. For programs alone: a
    library that is imported has no business with its process's allocator.
    """
    mmap_max, trim_threshold, top_pad = (-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)
    return _set_allocator(mmap_max, trim_threshold, top_pad)


def give_back_freed_memory() -> bool:
    """The contrary, for programs that are to take little: slower, and without gaps between what is kept."""
    mmap_max, mmap_threshold, trim_threshold, top_pad = (-4, 65536), (-3, 2**20), (-1, 2**20), (-2, 2**17)
    return _set_allocator(mmap_max, mmap_threshold, trim_threshold, top_pad)


def _set_allocator(*options: tuple[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
    return bool(set_option and all(set_option(*option) for option in options))


def is_out_of_memory(error: BaseException) -> bool:
    """Python's error, CUDA's, or what torch's allocator on the CPU raises."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "allocate memory"))
    )


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 2 with one line for a mistake, 130 after Ctrl-C, 141 where nobody reads
    what it prints any more (`… | head`).

    A mistake is a `UserError`, or what the system refuses: a full disk, a folder that may not be written to, memory.
    """
    keep_freed_memory()
    gc.set_threshold(20_000)  # importing torch makes many objects and no garbage
    for name in ("stdout", "stderr"):  # closed by the caller (`2>&-`): what is printed goes nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still wants to print at its end
        sys.exit(141)
    except (UserError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: got a task that takes more memory than there is: free some, or give it less at a time",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
