from pathlib import Path

import pytest

from animatediff.checkpoints.load import ImageModel, load_base
from tests.checkpoints.synthetic import METADATA, ldm_tensors, write


@pytest.fixture(scope="session")
def ldm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ldm") / "nano.safetensors", ldm_tensors(), **METADATA)


@pytest.fixture(scope="session")
def base(ldm_file: Path) -> ImageModel:
    return load_base(ldm_file)
