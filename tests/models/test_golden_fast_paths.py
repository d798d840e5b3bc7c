"""The golden numbers again, with every way of the CPU's own forced on, and with all of them off."""

import pytest
from animatediff_kernels import cpu, cpu_convolutions, use_backend
from animatediff_kernels.group_norm_silu import channels_last

from animatediff.models import attention, layers
from tests.models import test_controlnet_network as controlnet
from tests.models import test_golden as golden
from tests.models.test_controlnet_network import networks  # noqa: F401  a fixture
from tests.models.test_golden import base, files, unets  # noqa: F401  its fixtures


@pytest.fixture(params=["on", "off"], autouse=True)
def ways(request, monkeypatch):
    """On: for networks however narrow, in many parts; oneDNN multiplies where it can, whether it is faster or not."""
    if request.param == "off":
        with use_backend("torch"):
            yield set()
        return
    monkeypatch.setattr(cpu, "NARROWEST", 1)
    if "times as fast" in cpu.onednn_or_mkl().reason:  # else it would compute in fewer bits
        monkeypatch.setattr(cpu, "onednn_or_mkl", lambda: cpu.Choice("onednn", "as a test says"))
    monkeypatch.setattr(cpu_convolutions, "FEWEST_CHANNELS", {False: 1, True: 1})
    monkeypatch.setattr(cpu_convolutions, "MOST_COMPUTED", 9)
    monkeypatch.setattr(cpu_convolutions, "TILES", 5)
    monkeypatch.setattr(channels_last, "NUMBERS", 500)
    monkeypatch.setattr(layers, "CPU_PIXELS", 200)
    monkeypatch.setattr(attention, "CPU_ROWS", 7)
    used, real = set(), cpu_convolutions.conv_choice

    def noted(*args, **options):
        choice = real(*args, **options)
        used.add(choice.backend)
        return choice

    monkeypatch.setattr(cpu_convolutions, "conv_choice", noted)
    yield used


def test_image_model(base, ways):  # noqa: F811
    golden.test_image_model(base)
    assert not ways or "winograd" in ways


@pytest.mark.parametrize("t", [1, 981])
@pytest.mark.parametrize("version", golden.VERSIONS)
def test_video_model(unets, version, t):  # noqa: F811
    golden.test_video_model(unets, version, t)


@pytest.mark.slow
def test_guided_ddim_run(unets):  # noqa: F811
    golden.test_guided_ddim_run(unets, "v3")


def test_vae(base):  # noqa: F811
    golden.test_vae(base)
    golden.test_decoded_frames(base)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", golden.LORAS, ids=str)
def test_lora_of_the_unet(unets, files, case, merged):  # noqa: F811
    golden.test_lora_of_the_unet(unets, files, *case, merged)


def test_controlnet(networks):  # noqa: F811
    controlnet.test_residuals(networks)
    controlnet.test_video_model(networks)
