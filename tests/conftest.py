"""For all tests: a process per core, one seed, the mark of numeric tests, and the golden network as files."""

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread of torch's is enough for each

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="animatediff-tests-")  # no test reads or writes the user's own
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

gc.disable()  # What is imported stays: that it is looked through again and again is a tenth of the time.

COMPUTES = ("diffusion", "features", "metrics", "models")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the folders that compute are numeric ones."""
    for item in items:
        if Path(item.path).relative_to(Path(__file__).parent).parts[0] in COMPUTES:
            item.add_marker(pytest.mark.numeric)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(700, 10, 100)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that libraries can tidy up at the end


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every draw without a generator of its own is the same in every run, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # without a GPU `manual_seed` notes down, slowly, what it would do with one
        (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


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
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a script prints, and nothing else, for a mistake on its command line; one line, with exit code 2."""
    from animatediff.utils import run_main

    def told(main: Callable[[list[str]], int | None], *arguments: object) -> str:
        with pytest.raises(SystemExit) as exit:
            run_main(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return told


@pytest.fixture
def make_entry(nano: Path):
    """A `Request` for the golden network with other values."""
    from animatediff.config.spellings import build_request
    from tests.nano import entry

    return lambda **values: build_request(entry(nano, **values), where=str(values.get("name", "test")))
