"""The operators inside torch's own machinery: compile, checkpoint, autocast, FLOP counter."""

import pytest
import torch
from animatediff_kernels import (
    attention,
    geglu,
    linear_geglu,
    temporal_attention,
    temporal_attention_packed,
    use_backend,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("interpreter")


def block(x, frames=2):
    """A few operators in a row, of x (4, s, 16)."""
    x = x + temporal_attention(x, x, x, frames=frames, num_heads=2)
    x = x + attention(x, x, x, num_heads=2)
    return geglu(torch.cat([x, x], -1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_whole(backend):
    x = torch.randn(4, 5, 16, requires_grad=True)
    with use_backend(backend):
        expected = block(x)
        got = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        (grad,) = torch.autograd.grad(got.sum(), x)
    assert torch.allclose(got, expected, atol=1e-6) and torch.allclose(grad, expected_grad, atol=1e-5)


def test_checkpointed():
    x = torch.randn(4, 5, 16, requires_grad=True)
    with use_backend("triton"):
        (expected,) = torch.autograd.grad(block(x).sum(), x)
        (grad,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.equal(grad, expected)


def test_under_autocast():
    layer, x = torch.nn.Linear(16, 48), torch.randn(4, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        with use_backend("triton"):
            out = temporal_attention_packed(layer(x), frames=2, num_heads=2)
        with use_backend("torch"):
            expected = temporal_attention_packed(layer(x), frames=2, num_heads=2)
    assert out.dtype == torch.bfloat16 and torch.allclose(out, expected, atol=1e-2)
    (grad,) = torch.autograd.grad(out.float().sum(), layer.weight)
    assert grad.isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_flops_are_those_of_the_true_sizes(packed):
    import animatediff_kernels.flops  # noqa: F401  registers the formulas

    clips, frames, tokens, width = 2, 3, 5, 16
    x = torch.randn(clips * frames, tokens, width * (3 if packed else 1), requires_grad=True)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        if packed:
            out = temporal_attention_packed(x, frames=frames, num_heads=2)
        else:
            out = temporal_attention(x, x, x, frames=frames, num_heads=2)
        out.sum().backward()
        out = attention(x, x, x, num_heads=2)
        out.sum().backward()
    temporal = clips * tokens * 2 * frames * frames * width
    spatial = clips * frames * 2 * tokens * tokens * x.shape[-1]
    assert counter.get_total_flops() == 7 * temporal + 7 * spatial


def test_flops_of_a_gated_layer():
    import animatediff_kernels.flops  # noqa: F401  registers the formulas

    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (24, 8), 24))
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        linear_geglu(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 6 * 8 * 24  # again for backward, then the gradients of x and weight
