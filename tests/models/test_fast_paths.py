"""What runs differently where no gradient is needed: the same numbers, and training stays as it is."""

import pytest
import torch
import torch.nn.functional as F
from animatediff_kernels import geglu, group_norm_silu
from torch import nn

from animatediff.models import attention
from animatediff.models.layers import Upsample, upsampled_conv


@pytest.mark.parametrize(("c", "o", "h", "w"), [(3, 5, 4, 6), (8, 8, 1, 1), (2, 4, 7, 3)])
def test_upsampling_before_a_convolution_as_four_small_convolutions(c, o, h, w):
    conv, x = nn.Conv2d(c, o, 3, padding=1), torch.randn(2, c, h, w)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    got = upsampled_conv(x, conv.weight, conv.bias)
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
