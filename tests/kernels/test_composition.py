"""The operators inside torch's own machinery: compile, checkpoint, autocast, processes, FLOP counter."""

import pytest
import torch
from animatediff_kernels import attention, linear_geglu, temporal_attention, use_backend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.block import FRAMES, WIDTH, Block, gradients, half_of_the_gradients

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def clips():
    return torch.randn(2 * FRAMES, 5, WIDTH)


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "triton"])
def test_compiled_whole(backend, clips):
    block = Block()
    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    with use_backend(backend):
        found = [(out, *torch.autograd.grad(out.sum(), block.parameters())) for out in (whole(clips), block(clips))]
    assert_close(*found, 1e-5)


def test_checkpointed(clips):
    plain, saving = Block(), Block()
    expected = gradients(plain, clips)
    with use_backend("triton"):
        checkpoint(saving, clips, use_reentrant=False).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(saving.parameters(), expected, strict=True))


def test_under_autocast(clips):
    block, found = Block(), []
    for backend in ("triton", "torch"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            out = block(clips)
            found.append((out, *torch.autograd.grad(out.float().square().mean(), block.parameters())))
    assert [x.dtype for x in found[0]] == [x.dtype for x in found[1]]
    assert_close(*found, 3e-2)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path, clips):
    torch.save(clips, tmp_path / "x.pt")
    torch.multiprocessing.spawn(half_of_the_gradients, (tmp_path,), nprocs=2)
    expected = gradients(Block(), clips)
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, 1e-5)


def test_flops_are_those_of_the_true_sizes():
    import animatediff_kernels.flops  # noqa: F401  registers the formulas

    clips, frames, tokens, width = 2, 3, 5, 16
    x = torch.randn(clips * frames, tokens, width, requires_grad=True)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        temporal_attention(x, x, x, frames=frames, num_heads=2).sum().backward()
        attention(x, x, x, num_heads=2).sum().backward()
    temporal = clips * tokens * 2 * frames * frames * width
    spatial = clips * frames * 2 * tokens * tokens * x.shape[-1]
    assert counter.get_total_flops() == 7 * temporal + 7 * spatial


def test_flops_of_a_gated_layer():
    import animatediff_kernels.flops  # noqa: F401  registers the formulas

    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (24, 8), 24))
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        linear_geglu(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 6 * 8 * 24  # again for backward, then the gradients of x and weight
