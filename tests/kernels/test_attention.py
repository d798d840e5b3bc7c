"""The attention functions against attention written out in float64."""

import sys

import pytest
import torch
from animatediff_kernels import attention, temporal_attention


def written_out(q, k, v, heads):
    """q (n, s, c), k and v (n, l, c), in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("tokens", "keys"), [(7, 7), (5, 77), (64, 154)])
def test_attention(tokens, keys):
    q, k, v = torch.randn(3, tokens, 24), torch.randn(3, keys, 24), torch.randn(3, keys, 24)
    assert torch.allclose(attention(q, k, v, num_heads=4).double(), written_out(q, k, v, 4), atol=1e-5)


def test_consecutive_rows_share_keys():
    q, k, v = torch.randn(6, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    expected = written_out(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), 2)
    assert torch.allclose(attention(q, k, v, num_heads=2).double(), expected, atol=1e-5)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got 5 query rows and 2 key rows"):
        attention(torch.randn(5, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8), num_heads=2)


@pytest.mark.parametrize("frames", [1, 13, 16])
def test_temporal_attention_is_attention_of_each_pixel_along_frames(frames):
    b, s, c = 2, 6, 16
    q, k, v = (torch.randn(b * frames, s, c) for _ in range(3))

    def pixel_rows(x):
        return x.reshape(b, frames, s, c).transpose(1, 2).reshape(b * s, frames, c)

    expected = written_out(*(pixel_rows(x) for x in (q, k, v)), 4)
    expected = expected.reshape(b, s, frames, c).transpose(1, 2).reshape(b * frames, s, c)
    got = temporal_attention(q, k, v, frames=frames, num_heads=4)
    assert got.is_contiguous() and torch.allclose(got.double(), expected, atol=1e-5)


def test_no_call_hands_more_rows_than_a_cuda_grid_axis_takes(monkeypatch):
    module = sys.modules["animatediff_kernels.attention"]
    monkeypatch.setattr(module, "MAX_BATCH", 4)
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v: calls.append(len(q)) or real(q, k, v))
    q, k, v = (torch.randn(10, 3, 8) for _ in range(3))
    assert torch.allclose(attention(q, k, v, num_heads=2).double(), written_out(q, k, v, 2), atol=1e-5)
    assert calls == [4, 4, 2]
