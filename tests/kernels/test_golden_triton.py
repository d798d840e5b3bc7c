"""The golden numbers of tests/models again, with the network's attention in Triton's interpreter.

An image has a program per head and costs the interpreter half a minute a step, a pixel does not: by default only the
attention along frames runs in it, and all attention in the slow tests.
"""

import functools

import pytest
from animatediff_kernels import attention, use_backend

from animatediff.models import attention as spatial
from tests.models import test_golden as golden
from tests.models.test_golden import base, files, unets  # noqa: F401  its fixtures

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def test_video_model_along_frames(unets, monkeypatch):  # noqa: F811
    monkeypatch.setattr(spatial, "attention", functools.partial(attention, backend="torch"))
    golden.test_video_model(unets, "v2", 481)


@pytest.mark.slow
def test_image_model(base):  # noqa: F811
    golden.test_image_model(base)


@pytest.mark.slow
@pytest.mark.parametrize("version", golden.VERSIONS)
def test_video_model(unets, version):  # noqa: F811
    golden.test_video_model(unets, version, 481)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_lora_of_the_unet(unets, files, merged):  # noqa: F811
    golden.test_lora_of_the_unet(unets, files, "v2", "motion_lora", 0.7, "lora.motion_v2_a0.7", merged)


@pytest.mark.slow
@pytest.mark.parametrize("version", golden.VERSIONS)
def test_guided_ddim_run(unets, version):  # noqa: F811
    golden.test_guided_ddim_run(unets, version)
