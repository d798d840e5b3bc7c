"""A disk that is full, for tests: no file can grow beyond a few bytes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def nearly_full(room: int) -> Iterator[None]:
    """Let the system refuse what any file of this process would hold beyond `room` bytes."""
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
