from pathlib import Path

import pytest

from animatediff.config.prompt_yaml import AnimateEntry
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from tests.nano import entry, write_config, write_files


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def pipeline(nano: Path) -> AnimateDiffPipeline:
    return AnimateDiffPipeline.from_config(write_config(nano / "run.yaml", entry(nano)), device="cpu")


@pytest.fixture
def make_entry(nano: Path):
    """An `AnimateEntry` of the golden network with other values."""
    from animatediff.config.dataclass_io import build_dataclass

    return lambda **values: build_dataclass(AnimateEntry, entry(nano, **values), where="test")
