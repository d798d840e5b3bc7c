"""Files that are damaged at random give frames, or one line: no traceback, hang, crash, or memory without end."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORMATS = (".png", ".apng", ".gif", ".webp", ".jpg", ".mp4")


def fuzz(seed: int, count: int, *formats: str) -> None:
    command = [sys.executable, "-m", "tests.media.fuzz", str(seed), str(count), *formats]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]


def test_a_few_mutants_of_each_format():
    fuzz(0, 20)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_many_mutants(form):
    fuzz(1, 300, form)
