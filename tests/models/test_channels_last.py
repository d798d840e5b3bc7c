"""Maps whose channels lie side by side, which float32 inference on CPUs computes with: the same numbers."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from animatediff_kernels import cpu, cpu_convolutions, group_norm_silu, use_backend
from animatediff_kernels.cpu_convolutions import conv2d, conv_choice, upsampled_conv3x3
from animatediff_kernels.group_norm_silu import channels_last
from animatediff_kernels.group_norm_silu.reference import group_norm_silu_reference
from torch import Tensor

from animatediff.config.networks import MOTION_VERSIONS, UNetConfig, VAEConfig
from animatediff.features.freeu import freeu_applied
from animatediff.models import attention
from animatediff.models.controlnet_network import build_controlnet
from animatediff.models.layers import Conv, ResnetBlock
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE

LAST = torch.channels_last
EPS = torch.finfo(torch.float32).eps


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


SIZES = ((1, 1), (2, 3), (5, 7), (8, 3))
KERNELS = ((3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 1, 0), (3, 1, 0))  # with stride and padding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(size, *kernel) for size in SIZES for kernel in KERNELS if min(size) + 2 * kernel[2] >= kernel[0]],
)
@torch.no_grad()
def test_a_convolution_as_a_product(size, kernel, stride, padding, bias):
    """Where there are few pixels; the layout stays as it is everywhere."""
    for width in (2, 40):
        x, weight = drawn(3, 6, *size).to(memory_format=LAST), drawn(width, 6, kernel, kernel)
        added = drawn(width) if bias else None
        exact = F.conv2d(x.double(), weight.double(), None if added is None else added.double(), stride, padding)
        got = conv2d(x, weight, added, stride=stride, padding=padding)
        assert got.shape == exact.shape and got.is_contiguous(memory_format=LAST)
        assert error(got, exact) < EPS * (6 * kernel**2) ** 0.5
        if size != (1, 1):
            way = conv_choice(x, weight, stride=stride, padding=padding).backend
            assert way == ("rows" if exact[0, 0].numel() <= 16 else "torch")
            assert conv_choice(x.contiguous(), weight, stride=stride, padding=padding).backend == "torch"


@torch.no_grad()
def test_maps_of_unusual_strides_and_ranks():
    narrow = drawn(2, 5, 6).as_strided((2, 6, 1, 5), (30, 1, 1, 6))
    weight, wide = drawn(200, 6, 3, 3), Conv(128, 128, 3)
    assert conv_choice(narrow, weight).backend == "rows"
    exact = F.conv2d(narrow.double(), weight.double(), padding=1)
    assert error(conv2d(narrow, weight, None, padding=1), exact) < EPS * 54**0.5
    single = drawn(2, 128, 1, 1)
    assert conv_choice(single, wide.weight).backend == "rows" and conv_choice(single[:, :6], weight).backend == "torch"
    assert (
        error(wide(single), F.conv2d(single.double(), wide.weight.double(), wide.bias.double(), padding=1)) < 20 * EPS
    )
    assert wide(torch.empty(0, 128, 8, 8)).shape == (0, 128, 8, 8)
    assert wide(drawn(128, 8, 8)).shape == (128, 8, 8)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("size", [(7, 9), (4, 5), (9, 4), (11, 10)], ids=str)
@torch.no_grad()
def test_winograd_of_maps_that_are_no_multiple_of_its_tiles(monkeypatch, size, layout):
    monkeypatch.setattr(cpu_convolutions, "FEWEST_CHANNELS", {False: 1, True: 1})
    monkeypatch.setattr(cpu_convolutions, "MOST_COMPUTED", 9)
    monkeypatch.setattr(cpu_convolutions, "TILES", 3)
    x, weight, bias = drawn(2, 6, *size).to(memory_format=layout), drawn(5, 6, 3, 3), drawn(5)
    for doubled, got in ((False, conv2d(x, weight, bias, padding=1)), (True, upsampled_conv3x3(x, weight, bias))):
        assert conv_choice(x, weight, doubled=doubled).backend == "winograd"
        seen = F.interpolate(x.double(), scale_factor=2) if doubled else x.double()
        exact = F.conv2d(seen, weight.double(), bias.double(), padding=1)
        assert got.shape == exact.shape and got.is_contiguous(memory_format=layout)
        assert error(got, exact) < 10 * EPS * 54**0.5


@torch.no_grad()
def test_reciprocal_points_err_less_than_half_as_much(monkeypatch):
    x, weight = drawn(2, 128, 8, 8), drawn(128, 128, 3, 3)
    exact, errors = F.conv2d(x.double(), weight.double(), padding=1), []
    for points in (cpu_convolutions.POINTS, (0, 1, -1, 2, -2)):
        monkeypatch.setattr(cpu_convolutions, "POINTS", points)
        monkeypatch.setattr(cpu_convolutions, "_transforms", functools.cache(cpu_convolutions._transforms.__wrapped__))
        errors.append(error(cpu_convolutions.winograd(x, weight, None), exact))
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("numbers", [2**17, 50])
@pytest.mark.parametrize(("frames", "rows"), [(1, 0), (1, 2), (1, 4), (2, 0), (2, 4), (4, 1)])
@torch.no_grad()
def test_group_norm(monkeypatch, frames, rows, numbers):
    monkeypatch.setattr(channels_last, "NUMBERS", numbers)
    x, weight, bias = 3 + drawn(4, 24, 5, 7).to(memory_format=LAST), drawn(24), drawn(24)
    shift = 4 * drawn(rows, 24) if rows else None
    assert cpu.takes_channels_last(x)
    for silu in (True, False):
        got = group_norm_silu(x, 4, weight, bias, eps=1e-5, frames=frames, silu=silu, shift=shift)
        exact = [None if t is None else t.double() for t in (x, weight, bias, shift)]
        expected = group_norm_silu_reference(exact[0], 4, *exact[1:], 1e-5, frames, silu)
        assert got.is_contiguous(memory_format=LAST) and error(got, expected) < 20 * EPS


@torch.no_grad()
def test_group_norm_of_many_pixels_far_from_zero():
    """Rounded sums of squares that are not centred would be wrong by a thousandth: 50² times one number's rounding."""
    x = (50 + drawn(1, 8, 128, 256)).to(memory_format=LAST)
    ones, zeros = torch.ones(8), torch.zeros(8)
    got = group_norm_silu(x, 4, ones, zeros, eps=1e-5, silu=False)
    assert error(got, F.group_norm(x.double(), 4)) < 50 * EPS


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("over_frames", [True, False])
@torch.no_grad()
def test_a_resnet_block_that_normalises_in_winograds_tiles(monkeypatch, over_frames, wide):
    """And whole images at a time: the same as layer by layer."""
    monkeypatch.setattr(cpu_convolutions, "FEWEST_CHANNELS", {False: 8 if wide else 99, True: 99})
    torch.manual_seed(0)
    block = ResnetBlock(8, 12, groups=4, eps=1e-5, time_channels=6, norm_over_frames=over_frames)
    x, time = drawn(4, 8, 8, 12).to(memory_format=LAST), drawn(2, 6)
    before = x.clone()
    got = block(x, time, 2)
    block.chunk = 96
    in_parts = block(x, time, 2)
    seen = []
    block.conv2.register_forward_hook(lambda module, args, out: seen.append(out.clone()) or seen.append(out))
    hooked = block(x, time, 2)
    assert torch.equal(seen[0], seen[1])  # what a hook was given is not added to
    with use_backend("torch"):
        expected = block.double()(x.double(), time.double(), 2)
    for result in (got, in_parts, hooked):
        assert error(result, expected) < 1e-5
    assert got.is_contiguous(memory_format=LAST) and torch.equal(x, before)


@torch.no_grad()
def test_a_resnet_block_does_not_round_what_it_adds_to():
    block, x = ResnetBlock(8, 8, groups=4, eps=1e-5), drawn(1, 8, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == torch.float32


WIDE = UNetConfig(
    block_out_channels=(128, 256, 256, 256),
    attention_levels=(True, True, False, False),
    layers_per_block=1,
    context_dim=12,
    num_heads=4,
    motion=MOTION_VERSIONS["v1"],
)


def fill(network: torch.nn.Module) -> torch.nn.Module:
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / max(parameter[0].numel(), 25) ** 0.5)
    return network.eval()


@pytest.mark.parametrize(("size", "freeu"), [((8, 8), False), ((9, 14), False), ((8, 8), True)], ids=str)
@torch.no_grad()
def test_a_network_of_wide_layers(size, freeu):
    """A UNet with v1's motion module and a ControlNet: within it maps are channels_last, and what comes out is not."""
    torch.manual_seed(0)
    unet, seen = fill(UNet(WIDE)), set()
    controlnet = fill(build_controlnet(unet, downsampling=1))
    x, t, context = drawn(2, 3, 4, *size), torch.tensor([3, 700]), drawn(2, 5, 12)
    hint = controlnet.embed(drawn(3, 3, *size))

    def run(x=x, context=context, hint=hint):
        down, mid = controlnet(x, t, context, hint)
        with freeu_applied(unet, (1.2, 1.4), (0.9, 0.2)) if freeu else nullcontext():
            return unet(x, t, context, down_residuals=down, mid_residual=mid)

    def look(module, args):
        if args[0][0, 0].numel() > 1:
            seen.add(args[0].is_contiguous(memory_format=LAST))

    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            module.register_forward_pre_hook(look)
    got = run()
    assert seen == {True} and got.is_contiguous()
    with use_backend("torch"):
        expected = run()
    exact = [network.double() for network in (unet, controlnet)] and run(x.double(), context.double(), hint.double())
    assert not torch.equal(got, expected)
    assert error(expected, exact) < 1e-5 and error(got, exact) < 1e-5


@pytest.mark.parametrize("tokens", [3, 4])
@torch.no_grad()
def test_attention_of_many_tokens_is_in_float32(monkeypatch, tokens):
    """Of a network in bfloat16, as half precision attends slower."""
    monkeypatch.setattr(attention, "CPU_TOKENS", 4)
    layer, seen, real = attention.Attention(8, 2).bfloat16(), [], attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, k, v, **o: seen.append(q.dtype) or real(q, k, v, **o))
    out = layer(drawn(2, tokens, 8).bfloat16())
    assert out.dtype == torch.bfloat16 and seen == [torch.float32 if tokens == 4 else torch.bfloat16]


@torch.no_grad()
def test_a_compiler_sees_one_graph_of_torchs_layers():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (16, 16), "attention_levels": (False, False), "norm_num_groups": 4}
    unet = fill(UNet(replace(WIDE, motion=None, **sizes)))
    inputs = drawn(1, 2, 4, 8, 8), torch.tensor([3]), drawn(1, 5, 12)
    compiled = torch.compile(unet.forward, backend="eager", fullgraph=True, dynamic=False)
    with use_backend("torch"):
        expected = unet(*inputs)
    assert error(compiled(*inputs), expected.double()) < 1e-5


@torch.no_grad()
def test_a_wide_autoencoder():
    torch.manual_seed(0)
    vae = fill(VAE(VAEConfig(block_out_channels=(128, 128), layers_per_block=1)))
    x = drawn(2, 3, 18, 32)
    mean, _ = vae.encode(x)
    pixels = vae.decode(mean)
    with use_backend("torch"):
        expected = vae.encode(x)[0], vae.decode(mean)
    for got, other in zip((mean, pixels), expected, strict=True):
        assert got.shape == other.shape and error(got, other.double()) < 1e-5
    assert pixels.is_contiguous()
