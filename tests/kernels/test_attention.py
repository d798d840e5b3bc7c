"""The attention functions against attention written out."""

import sys

import pytest
import torch
from animatediff_kernels import attention, temporal_attention

from tests.kernels.checks import errors

pytestmark = pytest.mark.numeric


def written_out(q, k, v, heads):
    """q (n, s, c), k and v (n, l, c)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("tokens", "keys"), [(7, 7), (5, 77), (64, 154)])
def test_attention(tokens, keys):
    qkv = [torch.randn(3, n, 24) for n in (tokens, keys, keys)]
    assert max(errors(lambda *qkv: attention(*qkv, num_heads=4), lambda *qkv: written_out(*qkv, 4), qkv)) <= 1


def test_consecutive_rows_share_keys():
    def expected(q, k, v):
        return written_out(q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0), 2)

    qkv = torch.randn(6, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    assert max(errors(lambda *qkv: attention(*qkv, num_heads=2), expected, qkv)) <= 1


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got 5 query rows and 2 key rows"):
        attention(torch.randn(5, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8), num_heads=2)


@pytest.mark.parametrize("frames", [1, 13, 16])
def test_temporal_attention_is_attention_of_each_pixel_along_frames(frames):
    b, s, c = 2, 6, 16

    def expected(*qkv):
        pixels = [x.reshape(b, frames, s, c).transpose(1, 2).reshape(b * s, frames, c) for x in qkv]
        return written_out(*pixels, 4).reshape(b, s, frames, c).transpose(1, 2).reshape(b * frames, s, c)

    def got(*qkv):
        return temporal_attention(*qkv, frames=frames, num_heads=4)

    qkv = [torch.randn(b * frames, s, c) for _ in range(3)]
    assert got(*qkv).is_contiguous() and max(errors(got, expected, qkv)) <= 1


def test_no_call_hands_more_rows_than_a_cuda_grid_axis_takes(monkeypatch):
    module = sys.modules["animatediff_kernels.attention"]
    monkeypatch.setattr(module, "MAX_BATCH", 4)
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda q, k, v: calls.append(len(q)) or real(q, k, v))
    qkv = [torch.randn(10, 3, 8) for _ in range(3)]
    found = errors(lambda *qkv: attention(*qkv, num_heads=2), lambda *qkv: written_out(*qkv, 2), qkv, grad=False)
    assert max(found) <= 1 and calls == [4, 4, 2]
