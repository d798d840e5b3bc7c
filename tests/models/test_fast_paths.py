"""What runs differently where no gradient is needed: the same numbers, and training stays as it is."""

import pytest
import torch
import torch.nn.functional as F
from animatediff_kernels import cpu, geglu, group_norm_silu, use_backend
from animatediff_kernels import cpu_convolutions as convolutions
from animatediff_kernels.cpu_convolutions import upsampled_conv3x3
from torch import nn

from animatediff.models import attention, motion
from animatediff.models.layers import Conv, Upsample

ON, OFF = ("bf16", "ieee") if hasattr(torch.backends.mkldnn, "matmul") else ("medium", "highest")  # torch before 2.9


@pytest.mark.parametrize(("c", "o", "h", "w"), [(3, 5, 4, 6), (8, 8, 1, 1), (2, 4, 7, 3)])
def test_upsampling_before_a_convolution_as_four_small_convolutions(c, o, h, w):
    conv, x = nn.Conv2d(c, o, 3, padding=1), torch.randn(2, c, h, w)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    got = upsampled_conv3x3(x, conv.weight, conv.bias)
    assert got.shape == expected.shape and (got - expected).norm() < 1e-6 * expected.norm()


def counted(monkeypatch):
    calls = []
    real = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *args, **kw: calls.append(kw["size"]) or real(*args, **kw))
    return calls


@pytest.mark.parametrize("size", [(7, 8), (8, 7)])
@torch.no_grad()
def test_an_odd_target_is_interpolated(monkeypatch, size):
    calls, up = counted(monkeypatch), Upsample(4)
    assert up(torch.randn(1, 4, 4, 4), size).shape == (1, 4, *size) and calls == [size]


def test_training_interpolates(monkeypatch):
    calls, up = counted(monkeypatch), Upsample(4)
    up(torch.randn(1, 4, 4, 4))
    with torch.no_grad():
        up(torch.randn(1, 4, 4, 4))
    assert calls == [(8, 8)]


@torch.no_grad()
def test_another_layer_in_the_place_of_the_convolution_is_called():
    """As a LoRA's: it sees the enlarged map."""
    up, x = Upsample(4), torch.randn(1, 4, 3, 3)
    enlarged = F.interpolate(x, scale_factor=2)
    expected = up.conv(enlarged) + enlarged

    class Residual(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + x

    other = Residual(4, 4, 3, padding=1)
    other.load_state_dict(up.conv.state_dict())
    up.conv = other
    assert torch.equal(up(x), expected)


def test_feed_forward_in_rows(monkeypatch):
    monkeypatch.setattr(attention, "CPU_ROWS", 7)
    layer, x = attention.FeedForward(8), torch.randn(3, 5, 8)
    with torch.no_grad():
        rows = layer(x)
    assert rows.shape == x.shape and torch.allclose(rows, layer(x), atol=1e-6)


@pytest.mark.parametrize("gated", [geglu, lambda x: group_norm_silu(x, 2, x.new_ones(8), x.new_zeros(8), eps=1e-5)])
def test_in_place_arithmetic_leaves_the_input_alone(gated):
    x = torch.randn(2, 8, 4, 6)
    before = x.clone()
    assert torch.equal(gated(x), gated(before.requires_grad_())) and torch.equal(x, before)


# ---- Winograd ------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """Winograd for networks of a few channels, too, in more than one block of images and of outputs."""
    monkeypatch.setattr(convolutions, "FEWEST_CHANNELS", {False: 1, True: 1})


def conv_and_map(c=6, o=5, n=3, h=8, w=12):
    generator = torch.Generator().manual_seed(0)
    conv = Conv(c, o, 3)
    for parameter in conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return conv, torch.randn(n, c, h, w, generator=generator)


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("tiles", "weights"), [(100, 2**30), (12, 2**30), (1, 2**30), (100, 2000), (100, 1)])
@torch.no_grad()
def test_winograd_is_the_convolution(narrow, monkeypatch, tiles, weights):
    """However it is cut into blocks: up to rounding, which the transforms' numbers of up to 8 make some ten times
    larger than the convolution's own, about eps * sqrt(9 c)."""
    monkeypatch.setattr(convolutions, "TILES", tiles)
    monkeypatch.setattr(convolutions, "WEIGHT_BYTES", weights)
    conv, x = conv_and_map()
    bound = 10 * torch.finfo(torch.float32).eps * 54**0.5
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert convolutions.conv_choice(x, conv.weight).backend == "winograd"
    assert relative(conv(x), exact) < bound and not torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    enlarged = F.interpolate(x.double(), scale_factor=2)
    exact = F.conv2d(enlarged, conv.weight.double(), conv.bias.double(), padding=1)
    assert convolutions.conv_choice(x, conv.weight, doubled=True).backend == "winograd"
    assert relative(upsampled_conv3x3(x, conv.weight, conv.bias), exact) < bound


@torch.no_grad()
def test_why_a_convolution_is_torchs(narrow, monkeypatch):
    conv, x = conv_and_map()

    def reason(x=x, weight=conv.weight, **options):
        choice = convolutions.conv_choice(x, weight, **options)
        assert choice.backend == ("four" if options.get("doubled") else "torch")
        return choice.reason

    assert "tiles of 4x4 compute 64 pixels of a map of 40" in reason(x[..., :5])
    assert "tiles of 2x2 compute 4 pixels of a map of 1" in reason(x[..., :1, :1], doubled=True)
    assert "a 3x3 kernel of stride 2" in reason(stride=2)
    assert "torch.float64 on cpu" in reason(x.double())
    with torch.enable_grad():
        assert "gradients" in reason()
    with torch.autocast("cpu"):
        assert "autocast" in reason()
    with use_backend("torch"):
        assert "asked for" in reason()
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    monkeypatch.setattr(convolutions, "FEWEST_CHANNELS", {False: 6, True: 256})
    assert "6 to 5 channels, Winograd pays from 6" in reason()


@torch.no_grad()
def test_nothing_of_the_weights_is_kept(narrow):
    """They may be merged, trained or replaced between two calls."""
    conv, x = conv_and_map()
    before = conv(x)
    conv.weight.mul_(2)
    conv.bias.mul_(2)
    assert torch.allclose(conv(x), 2 * before, rtol=1e-5, atol=1e-5)
    conv.weight = nn.Parameter(torch.zeros_like(conv.weight))
    assert torch.equal(conv(x), conv.bias.view(1, -1, 1, 1).expand_as(before))


def test_training_is_torchs_own(narrow):
    conv, x = conv_and_map()
    x.requires_grad_()
    conv(x).square().sum().backward()
    grads = x.grad, conv.weight.grad
    x.grad = conv.weight.grad = None
    F.conv2d(x, conv.weight, conv.bias, padding=1).square().sum().backward()
    assert torch.equal(grads[0], x.grad) and torch.equal(grads[1], conv.weight.grad)


@pytest.mark.parametrize("target", ["conv", "proj"])
@torch.no_grad()
def test_hooks_are_called(narrow, target):
    """Also where the fast path needs the weights alone."""
    up, gate, seen = Upsample(4), attention.GEGLU(4, 8), []
    layer, run = {
        "conv": (up.conv, lambda: up(torch.zeros(1, 4, 4, 4))),
        "proj": (gate.proj, lambda: gate(torch.zeros(2, 4))),
    }[target]
    layer.register_forward_hook(lambda module, inputs, out: seen.append(out) or out + 1)
    changed = run()
    layer._forward_hooks.clear()
    assert len(seen) == 1 and not torch.equal(changed, run())


# ---- oneDNN's products ---------------------------------------------------------------------------------------------


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(cpu, "onednn_or_mkl", lambda: cpu.Choice("onednn", "as a test says"))
    return cpu._get_precision


@torch.no_grad()
def test_the_switch_is_on_within_a_network_alone(onednn):
    x, weight, own = torch.randn(1, 4, 8, 8), torch.randn(320, 4, 3, 3), onednn()
    with cpu.fast_products(x, weight):
        assert onednn() == ON
        with cpu.fast_products(x, weight):
            assert onednn() == ON
        with cpu.plain_products():
            assert onednn() == own
        assert onednn() == ON
    assert onednn() == own
    with pytest.raises(KeyError), cpu.fast_products(x, weight):
        raise KeyError
    assert onednn() == own
    for small in (weight[:64], weight.double()):
        with cpu.fast_products(x, small):
            assert onednn() == own
    with torch.enable_grad(), cpu.fast_products(x, weight):
        assert onednn() == own


@torch.no_grad()
def test_the_callers_setting_comes_back(onednn):
    before = onednn()
    try:
        cpu._set_precision(OFF)
        with cpu.fast_products(torch.randn(1, 4, 8, 8), torch.randn(320, 4, 3, 3)):
            pass
        assert onednn() == OFF
    finally:
        cpu._set_precision(before)


def test_amx_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    assert cpu.onednn_or_mkl.__wrapped__().backend == "torch"


def test_a_switch_that_computes_in_bfloat16_is_not_taken(monkeypatch):
    """As on ARM's CPUs, however fast it is."""
    own, linear = cpu._get_precision(), F.linear

    def rounded(x, weight):
        fewer = cpu._get_precision() == ON
        return linear(x.bfloat16(), weight.bfloat16()).float() if fewer else linear(x, weight)

    monkeypatch.setattr(cpu, "_has_amx", lambda: False)
    monkeypatch.setattr(cpu, "_seconds_of", lambda x, w: 1.0 if cpu._get_precision() == ON else 2.0)
    monkeypatch.setattr(cpu.F, "linear", rounded)
    choice = cpu.onednn_or_mkl.__wrapped__()
    assert choice.backend == "torch" and choice.reason.startswith("the switch computes in fewer bits on this CPU")
    assert cpu._get_precision() == own


@pytest.mark.parametrize(
    ("onednn_seconds", "amd", "backend"),
    [(1.0, False, "onednn"), (2.0, False, "torch"), (2.0, True, "onednn"), (3.0, True, "torch")],
)
def test_the_faster_library_is_taken(monkeypatch, onednn_seconds, amd, backend):
    """On AMD's CPUs oneDNN, unless it is slower."""
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)
    monkeypatch.setattr(cpu, "_is_amd", lambda: amd)
    monkeypatch.setattr(cpu, "FLOAT32_ERROR", 1)  # of whatever CPU the test runs on
    own = cpu._get_precision()
    monkeypatch.setattr(cpu, "_seconds_of", lambda x, w: onednn_seconds if cpu._get_precision() == ON else 2.0)
    assert cpu.onednn_or_mkl.__wrapped__().backend == backend
    assert cpu._get_precision() == own


@torch.no_grad()
def test_temporal_attention_is_left_out_of_the_switch_and_of_half_precision(onednn, monkeypatch):
    layer, x, seen = motion.TemporalAttention(16, 2), torch.randn(4, 6, 16), []
    real = motion.temporal_attention
    monkeypatch.setattr(
        motion, "temporal_attention", lambda q, k, v, **o: seen.append((q.dtype, onednn())) or real(q, k, v, **o)
    )
    with cpu.fast_products(x, torch.randn(320, 4, 3, 3)):
        layer(x, 4)
    assert layer.bfloat16()(x.bfloat16(), 4).dtype == torch.bfloat16
    assert [dtype for dtype, _ in seen] == [torch.float32] * 2 and seen[0][1] == onednn()
