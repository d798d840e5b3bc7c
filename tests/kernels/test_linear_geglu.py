"""The linear layer with GEGLU in its epilogue, in Triton's interpreter."""

import pytest
import torch
from animatediff_kernels import launch, linear_geglu, use_backend
from animatediff_kernels.linear_geglu.op import linear_geglu_op
from animatediff_kernels.linear_geglu.reference import linear_geglu_reference
from torch import nn

from animatediff.models.attention import GEGLU
from tests.kernels.checks import DTYPES, assert_right

pytestmark = pytest.mark.usefixtures("interpreter")


class Sum(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def weights(width, inner):
    return torch.randn(2 * inner, width) / width**0.5, torch.randn(2 * inner)


@DTYPES
@pytest.mark.parametrize(
    ("shape", "inner"),
    [
        pytest.param((2, 9, 320), 600, id="the width of level 0"),
        pytest.param((1, 5, 640), 300, id="the width of level 1"),
        pytest.param((3, 1280), 640, id="the width of levels 2 and 3, rows without images"),
        pytest.param((3, 7, 21), 19, id="odd sizes"),
        pytest.param((1, 300, 24), 40, id="several tiles of rows, a masked width"),
        pytest.param((1, 1, 1), 1, id="one number"),
    ],
)
def test_linear_geglu(shape, inner, dtype):
    inputs = [torch.randn(shape), *weights(shape[-1], inner)]
    assert_right(linear_geglu, linear_geglu_reference, [x.to(dtype) for x in inputs])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="images not side by side"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="channels not side by side"),
        pytest.param(lambda x: x.repeat(1, 1, 3)[..., : x.shape[-1]], id="a slice of a wider tensor"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded"),
    ],
)
def test_inputs_of_any_layout(layout):
    weight, bias = weights(24, 20)
    inputs = [layout(torch.randn(2, 20, 24)), weight.mT.contiguous().mT, bias]
    assert_right(linear_geglu, linear_geglu_reference, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("width", [320, 648], ids=["whole steps", "a masked step"])
def test_the_launches_of_a_gpu_compute_the_same(monkeypatch, arch, width):
    """Several tiles of rows and columns, in groups of eight and a rest."""
    monkeypatch.setattr(launch, "architecture", lambda x: arch)
    inputs = [torch.randn(1100, width), *weights(width, 200)]
    assert_right(linear_geglu, linear_geglu_reference, [x.half() for x in inputs], grad=False)


def test_only_the_gradients_that_are_asked_for():
    x, (weight, bias) = torch.randn(2, 3, 8, requires_grad=True), weights(8, 12)
    with use_backend("triton"):
        linear_geglu(x, weight, bias).sum().backward()
    assert x.grad is not None and weight.grad is bias.grad is None


def test_weights_of_another_dtype_are_refused():
    x, (weight, bias) = torch.randn(2, 3, 8), weights(8, 12)
    with pytest.raises(ValueError, match="linear_geglu: .* the tensors differ in dtype"):
        linear_geglu(x.half(), weight, bias, backend="triton")


def test_under_autocast_in_its_dtype():
    layer, x = GEGLU(16, 24), torch.randn(4, 5, 16)
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        found.append((out, *torch.autograd.grad(out.float().sum(), layer.parameters())))
    for ours, torchs, dtype in zip(*found, [torch.bfloat16, torch.float32, torch.float32], strict=True):
        assert ours.dtype == torchs.dtype == dtype
        assert (ours.float() - torchs.float()).norm() < 2e-2 * torchs.float().norm()


def test_another_layer_in_the_place_of_the_linear_one_is_called():
    """As a LoRA's: its branch is added before the gate."""
    layer, x = GEGLU(16, 24), torch.randn(2, 5, 16)
    branch = nn.Linear(16, 48)
    with use_backend("triton"):
        before = layer(x)
        proj, layer.proj = layer.proj, Sum(layer.proj, branch)
        changed, layer.proj = layer(x), proj
        assert torch.equal(layer(x), before)
    expected = linear_geglu(x, proj.weight + branch.weight, proj.bias + branch.bias, backend="torch")
    assert torch.allclose(changed, expected, atol=1e-5)


def test_registration():
    inputs = torch.randn(2, 3, 8), *weights(8, 12)
    torch.library.opcheck(linear_geglu_op, [x.requires_grad_() for x in inputs])
