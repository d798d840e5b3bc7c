"""What mixes the frames: attention with or without positions, or a convolution, and what each of them can know."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from animatediff.config.networks import MOTION_VERSIONS, MotionConfig, UNetConfig
from animatediff.models.lora import LoRAStack
from animatediff.models.motion import MotionModule, TemporalAttention, TemporalConvolution
from animatediff.models.unet import UNet
from animatediff.training.lora_stages import attach_lora
from animatediff.utils import UserError

CONVOLUTION = MotionConfig(temporal="convolution")
KINDS = [MotionConfig(), MotionConfig(positional_encoding=False), CONVOLUTION]
SMALL = UNetConfig(
    block_out_channels=(8, 16), attention_levels=(True, True), layers_per_block=1, context_dim=8, num_heads=2,
    norm_num_groups=4,
)  # fmt: skip


def awake(config: MotionConfig) -> MotionModule:
    """A module whose zero-initialised output has something to say."""
    torch.manual_seed(0)
    module = MotionModule(16, replace(config, num_heads=2), groups=4).requires_grad_(False)
    torch.nn.init.normal_(module.temporal_transformer.proj_out.weight, std=0.2)
    return module


def clip(frames: int) -> torch.Tensor:
    return torch.randn(frames, 16, 3, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", KINDS)
def test_a_fresh_module_is_the_identity(config):
    assert torch.equal(MotionModule(16, config, groups=4)(clip(6), 3), clip(6))


@pytest.mark.parametrize("width", [40, 320])
def test_a_convolution_has_as_many_parameters_as_attention(width):
    counts = [sum(p.numel() for p in m.parameters()) for m in (TemporalAttention(width, 8), TemporalConvolution(width))]
    assert counts == [4 * width**2 + width] * 2


def test_a_convolutional_module_of_sd15s_size():
    with torch.device("meta"):
        unet = UNet(UNetConfig(motion=replace(MOTION_VERSIONS["v3"], temporal="convolution")))
    assert sum(p.numel() for _, p in unet.motion_parameters()) == 417_137_600, "as test_sd15_motion_size has it"


@torch.no_grad()
def test_the_convolution_is_along_time():
    layer, tokens = TemporalConvolution(4), torch.randn(2 * 5, 3, 4)
    series = tokens.view(2, 5, 3, 4).permute(0, 2, 3, 1).reshape(6, 4, 5)  # ((b s), c, f)
    mixed = F.conv1d(series, layer.conv.weight[..., 0], padding=1).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    expected = layer.pointwise(F.silu(mixed)).reshape(10, 3, 4)
    assert torch.allclose(layer(tokens, 5), expected, atol=1e-6)


@pytest.mark.parametrize(("config", "equivariant"), list(zip(KINDS, [False, True, False], strict=True)))
def test_only_without_positions_the_order_of_frames_is_unknown(config, equivariant):
    module, x, order = awake(config), clip(6), torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(module(x[order], 6), module(x, 6)[order], atol=1e-5) == equivariant


def test_a_convolution_knows_the_borders_and_nothing_else_of_where_it_is():
    """Two layers of three frames each reach two frames far."""
    module, x = awake(CONVOLUTION), clip(9)
    later, whole = module(x[1:], 8), module(x, 9)[1:]
    assert torch.allclose(later[2:], whole[2:], atol=1e-5)
    assert (later[0] - whole[0]).abs().max() > 1e-3


def test_clips_of_a_batch_do_not_mix():
    module, x = awake(CONVOLUTION), clip(6)
    alone = torch.cat([module(x[:3], 3), module(x[3:], 3)])
    assert torch.allclose(module(x, 3), alone, atol=1e-5)


def test_a_motion_lora_needs_attention():
    of_attention = UNet(SMALL.with_motion(MotionConfig(num_heads=2)))
    lora = attach_lora("motion-lora", of_attention, rank=2).lora
    unet = UNet(SMALL.with_motion(CONVOLUTION))
    with pytest.raises(UserError, match="no motion modules with attention, load one first"):
        LoRAStack(unet).add(lora)
    with pytest.raises(UserError, match="without layers for a motion-lora, expected one that has attention"):
        attach_lora("motion-lora", unet, rank=2)
