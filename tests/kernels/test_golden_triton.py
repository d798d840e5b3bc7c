"""The golden numbers of tests/models again, with all kernels of the network in Triton's interpreter.

Spatial attention has a program per head of every image and costs the interpreter half a minute a step: by default only
the attention along frames runs in it on the golden network, and all kernels on a tiny one.
"""

import functools

import pytest
import torch
from animatediff_kernels import attention, group_norm_silu, layer_norm, linear_geglu, use_backend

from animatediff.config.networks import MotionConfig, UNetConfig
from animatediff.models import attention as spatial
from animatediff.models import layers
from animatediff.models.unet import UNet
from tests.models import test_golden as golden
from tests.models.test_golden import base, files, unets  # noqa: F401  its fixtures

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


@pytest.mark.slow
def test_video_model_along_frames(unets, monkeypatch):  # noqa: F811
    for module, function in (
        (spatial, attention),
        (spatial, linear_geglu),
        (layers, group_norm_silu),
        (layers, layer_norm),
    ):
        monkeypatch.setattr(module, function.__name__, functools.partial(function, backend="torch"))
    golden.test_video_model(unets, "v2", 481)


@torch.no_grad()
def test_a_tiny_network_uses_every_kernel_and_computes_the_same():
    """Clips and frames are normalised apart, text and self-attention, an upsampler: one layer of each kind."""
    torch.manual_seed(0)
    motion = MotionConfig(num_heads=2, resnet_norm_over_frames=True, resolutions=(1,))
    sizes = {"block_out_channels": (8, 16), "attention_levels": (True, False), "norm_num_groups": 2}
    unet = UNet(UNetConfig(layers_per_block=1, context_dim=6, num_heads=2, motion=motion, **sizes))
    for name, parameter in unet.motion_parameters():
        if "proj_out" in name:  # a fresh motion module does nothing
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(1, 2, 4, 4, 2), torch.tensor([500]), torch.randn(1, 5, 6)
    with torch.profiler.profile() as profile:
        got = unet(*inputs)
    used = {event.name.removeprefix("animatediff::") for event in profile.events() if "animatediff::" in event.name}
    assert used == {"temporal_attention", "attention", "group_norm_silu", "layer_norm", "linear_geglu"}
    with use_backend("torch"):
        golden.assert_close(got, unet(*inputs))


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
