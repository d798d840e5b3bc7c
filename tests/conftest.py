"""The golden network as files; and a process per core (pytest-xdist); one thread of torch is enough for each."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.nano import write_files

    return write_files(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def pipeline(nano: Path):
    from animatediff.pipeline.pipeline import AnimateDiffPipeline
    from tests.nano import entry, write_config

    return AnimateDiffPipeline.from_config(write_config(nano / "run.yaml", entry(nano)), device="cpu")


@pytest.fixture
def make_entry(nano: Path):
    """A `Request` for the golden network with other values."""
    from animatediff.config.spellings import build_request
    from tests.nano import entry

    return lambda **values: build_request(entry(nano, **values), where=str(values.get("name", "test")))
