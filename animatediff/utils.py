"""Errors a user can act on, and the frame every script runs in."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(ValueError):
    """A mistake in the input. The message says what was got, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all options)")


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Let a `UserError` of the block start with the file (or the place) that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 2 with one line for a mistake, 130 after Ctrl-C, 141 where nobody reads
    what it prints any more (`… | head`).

    A mistake is a `UserError`, or what the system refuses: a full disk, a folder that may not be written to.
    """
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still wants to print at its end
        sys.exit(141)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
