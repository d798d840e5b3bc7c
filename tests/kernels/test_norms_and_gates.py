"""GroupNorm + SiLU, LayerNorm + frame code and GEGLU, in Triton's interpreter."""

import mmap

import pytest
import torch
from animatediff_kernels import geglu, group_norm_silu, launch, layer_norm
from animatediff_kernels.geglu.op import geglu_op
from animatediff_kernels.geglu.reference import geglu_reference
from animatediff_kernels.group_norm_silu.op import group_norm_silu_op
from animatediff_kernels.group_norm_silu.reference import group_norm_silu_reference
from animatediff_kernels.layer_norm.op import layer_norm_op
from animatediff_kernels.layer_norm.reference import layer_norm_reference

from tests.kernels.checks import DTYPES, assert_right

pytestmark = pytest.mark.usefixtures("interpreter")


def check_group_norm(x, groups, frames, silu=True, shift=()):
    weight, bias = torch.randn(2, x.shape[1]).to(x.dtype)
    assert_right(
        lambda x, w, b, shift=None: group_norm_silu(x, groups, w, b, eps=1e-5, frames=frames, silu=silu, shift=shift),
        lambda x, w, b, shift=None: group_norm_silu_reference(x, groups, w, b, shift, 1e-5, frames, silu),
        [x, weight, bias, *shift],
    )


@DTYPES
@pytest.mark.parametrize(
    ("shape", "groups", "frames", "silu"),
    [
        pytest.param((2, 80, 4, 4), 8, 1, True, id="10 channels per group, one image each"),
        pytest.param((4, 64, 3, 5), 4, 2, True, id="statistics of clips of two frames, odd sizes"),
        pytest.param((1, 96, 4, 4), 4, 1, False, id="no SiLU, more channels than a tile"),
        pytest.param((2, 8, 1, 1), 2, 2, True, id="one token"),
    ],
)
def test_group_norm_silu(shape, groups, frames, silu, dtype):
    x = (3 + torch.randn(shape)).to(dtype)
    check_group_norm(x.to(memory_format=torch.channels_last), groups, frames, silu)


@DTYPES
@pytest.mark.parametrize("channels", [320, *(pytest.param(n, marks=pytest.mark.slow) for n in (640, 960, 1920, 2560))])
def test_group_norm_of_the_widths_of_the_network(channels, dtype):
    """In 32 groups: of frames before spatial attention, of clips in v1's motion modules, with the time in ResNets."""
    x = (3 + torch.randn(4, channels, 3, 2)).to(dtype).to(memory_format=torch.channels_last)
    check_group_norm(x, 32, 1, silu=False)
    check_group_norm(x, 32, 2, shift=[torch.randn(2, channels).to(dtype)])


@DTYPES
@pytest.mark.parametrize(("frames", "rows"), [(1, 2), (2, 2), (2, 4), (4, 1)], ids=lambda n: str(n))
def test_group_norm_of_shifted_images(frames, rows, dtype):
    """Rows of the shift for clips or for images, statistics of images or of clips."""
    x, shift = 3 + torch.randn(4, 24, 3, 5), 4 * torch.randn(24, rows).T
    check_group_norm(x.to(dtype).to(memory_format=torch.channels_last), 4, frames, shift=[shift.to(dtype)])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x, id="contiguous"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x.repeat(1, 2, 1, 1)[:, : x.shape[1]], id="half of the channels"),
    ],
)
def test_group_norm_of_any_layout(layout):
    check_group_norm(layout(torch.randn(2, 8, 3, 5)), 4, 1)


def test_group_norm_of_an_image_of_more_than_2_31_numbers():
    """Where its last channel lies does not fit into 32 bits. The memory between the channels is never touched."""
    channels, stride = 5, 2**29
    memory = mmap.mmap(-1, 2 * (stride * (channels - 1) + 2))
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, channels, 1, 2), (stride * channels, stride, 2, 1))
    x.copy_(torch.randn(x.shape))
    weight, bias = torch.ones(2, channels, dtype=torch.float16)
    found = group_norm_silu(x, 1, weight, bias, eps=1e-5, backend="triton")
    expected = group_norm_silu(x.contiguous(), 1, weight, bias, eps=1e-5, backend="triton")
    assert torch.equal(found, expected)


def test_group_norm_keeps_the_memory_format():
    x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    y = group_norm_silu(x, 2, torch.ones(8), torch.zeros(8), eps=1e-5, backend="triton")
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_of_many_parts_far_from_zero(monkeypatch):
    """Sum and sum of squares would cancel here; Chan's formula does not. And many chunks of a GPU's size."""
    monkeypatch.setattr(launch, "architecture", lambda x: "sm_90")
    check_group_norm(300 + torch.randn(2, 8, 20, 20), 2, 2)


@DTYPES
@pytest.mark.parametrize(
    ("images", "tokens", "width", "frames"),
    [
        pytest.param(4, 9, 40, 2, id="two frames' codes, a masked width"),
        pytest.param(2, 5, 320, None, id="level 0, no code"),
        pytest.param(4, 3, 640, 2, id="level 1"),
        pytest.param(4, 2, 1280, 2, id="levels 2 and 3"),
        pytest.param(1, 1, 64, 1, id="one row"),
    ],
)
def test_layer_norm(images, tokens, width, frames, dtype):
    inputs = [5 + torch.randn(images, tokens, width), *torch.randn(2, width)]
    inputs += [torch.randn(frames, width)] if frames else []
    assert_right(
        lambda x, w, b, code=None: layer_norm(x, w, b, code=code),
        lambda x, w, b, code=None: layer_norm_reference(x, w, b, code, 1e-5),
        [x.to(dtype) for x in inputs],
    )


def test_layer_norm_with_the_launch_of_a_gpu(monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda x: "sm_90")
    assert_right(
        lambda x, w, b: layer_norm(x, w, b),
        lambda x, w, b: layer_norm_reference(x, w, b, None, 1e-5),
        [torch.randn(2, 25, 640).transpose(0, 1), *torch.randn(2, 640)],
    )


def test_layer_norm_without_eps_leaves_rows_that_are_not_there_alone():
    x, w, b = torch.randn(1, 7, 40), *torch.randn(2, 40)
    assert_right(
        lambda x, w, b: layer_norm(x, w, b, eps=0.0),
        lambda x, w, b: layer_norm_reference(x, w, b, None, 0.0),
        [x, w, b],
    )


@DTYPES
@pytest.mark.parametrize("shape", [(3, 7, 2 * 1280), (2, 3, 2 * 2560), (3, 2 * 5120), (5, 2 * 12), (1, 2)], ids=str)
def test_geglu(shape, dtype):
    assert_right(geglu, geglu_reference, [2 * torch.randn(shape).to(dtype)])


CALLS = {
    "group_norm_silu": lambda x: (group_norm_silu_op, (x, 2, *weights(x.shape[1]), None, 1e-5, 2, True)),
    "shifted": lambda x: (
        group_norm_silu_op,
        (x, 2, *weights(4), torch.randn(1, 4, requires_grad=True), 1e-5, 2, True),
    ),
    "layer_norm": lambda x: (layer_norm_op, (x[0], *weights(x.shape[3]), torch.randn(2, x.shape[3]), 1e-5)),
    "geglu": lambda x: (geglu_op, (x,)),
}


def weights(width):
    return [torch.randn(width, requires_grad=True) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_registration(name):
    x = torch.randn(2, 4, 3, 6, requires_grad=True)
    torch.library.opcheck(*CALLS[name](x))


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w, b: layer_norm(x, w, b, code=torch.ones(2, 8), backend="triton"),
        lambda x, w, b: group_norm_silu(x.mT[..., None], 2, w, b, eps=1e-5, backend="triton")[..., 0].mT,
    ],
    ids=["layer_norm", "group_norm_silu"],
)
def test_weights_may_be_float32_as_under_autocast(norm):
    x, (w, b) = torch.randn(2, 3, 8), (t.requires_grad_() for t in weights(8))
    out, exact = norm(x.half(), w, b), norm(x, w, b)
    assert out.dtype == torch.float16 and torch.allclose(out.float(), exact, atol=5e-3)
    grads = torch.autograd.grad(out.float().sum(), [w, b])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("lay", [lambda t: t[:1].expand(8), lambda t: t[::2]], ids=["expanded", "every second"])
@pytest.mark.parametrize("norm", ["layer_norm", "group_norm_silu"])
def test_weights_of_any_layout(norm, lay):
    x, w, b = torch.randn(2, 3, 8), lay(torch.randn(16)), lay(torch.randn(16))
    calls = {
        "layer_norm": lambda x, w, b, backend: layer_norm(x, w, b, backend=backend),
        "group_norm_silu": lambda x, w, b, backend: group_norm_silu(
            x.mT[..., None], 2, w, b, eps=1e-5, backend=backend
        ),
    }
    results = []
    for backend in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() if t is x else t.detach().requires_grad_() for t in (x, w, b)]
        y = calls[norm](*leaves, backend)
        results.append([y, *torch.autograd.grad((y * torch.linspace(0, 1, y.numel()).view_as(y)).sum(), leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
