import importlib
import sys

import pytest
import torch
from animatediff_kernels import dispatch


def reload_kernels() -> None:
    """Triton decides when a kernel is decorated whether it will be interpreted; its own library's kernels included."""
    language = importlib.import_module("triton.language")
    importlib.reload(language.standard)
    importlib.reload(language)
    for name in [m for m in sys.modules if m.startswith("animatediff_kernels.") and ".triton_" in m]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def interpreter():
    """In this test module Triton kernels run on the CPU, whether or not triton was imported before."""
    if (reason := dispatch.triton_missing()) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        reload_kernels()
        yield
    reload_kernels()


@pytest.fixture(autouse=True)
def memory_is_born_as_nan():
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    yield
    torch.use_deterministic_algorithms(False)
