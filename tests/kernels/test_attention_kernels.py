"""The attention kernels, in Triton's interpreter."""

import pytest
import torch
from animatediff_kernels import attention, launch
from animatediff_kernels.attention.op import attention_op
from animatediff_kernels.attention.reference import attention_reference

from tests.kernels.checks import DTYPES, assert_right

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = [  # images, rows of keys, tokens, keys, heads, head_dim
    pytest.param(2, 2, 30, 30, 8, 40, id="self: width 32 + 16"),
    pytest.param(1, 1, 64, 64, 4, 80, id="self: width 64 + 16"),
    pytest.param(1, 1, 64, 64, 2, 160, id="self: width 128 + 32"),
    pytest.param(1, 1, 275, 275, 1, 40, id="self: several tiles of keys, an odd number of tokens"),
    pytest.param(2, 2, 7, 7, 3, 4, id="self: the smallest width, an odd number of heads"),
    pytest.param(1, 1, 33, 33, 1, 64, id="self: one head as wide as a tile"),
    pytest.param(4, 2, 21, 77, 8, 40, id="text: 77 keys shared by two frames"),
    pytest.param(3, 1, 9, 154, 2, 80, id="text: 154 keys shared by three frames"),
    pytest.param(2, 2, 9, 77, 2, 160, id="text: one frame per row"),
    pytest.param(2, 1, 9, 308, 2, 40, id="text: more keys than one pass holds"),
]


@DTYPES
@pytest.mark.parametrize(("images", "rows", "tokens", "keys", "heads", "dim"), SHAPES)
def test_attention(images, rows, tokens, keys, heads, dim, dtype):
    assert_right(
        lambda q, k, v: attention(q, k, v, num_heads=heads),
        lambda q, k, v: attention_reference(q, k, v, heads),
        [torch.randn(n, size, heads * dim).to(dtype) for n, size in ((images, tokens), (rows, keys), (rows, keys))],
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="channels not side by side"),
        pytest.param(lambda x: x.repeat(1, 1, 3)[..., : x.shape[-1]], id="slices of one tensor"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded"),
    ],
)
def test_inputs_of_any_layout(layout):
    q, k, v = (layout(torch.randn(2, 20, 4 * 20)) for _ in range(3))
    assert_right(
        lambda q, k, v: attention(q, k, v, num_heads=4), lambda q, k, v: attention_reference(q, k, v, 4), [q, k, v]
    )


@pytest.mark.slow
@pytest.mark.parametrize("keys", [None, 77, 154], ids=["self", "77 keys", "154 keys"])
@pytest.mark.parametrize("dim", [40, 80, 160])
def test_the_launches_of_a_gpu_compute_the_same(monkeypatch, dim, keys):
    monkeypatch.setattr(launch, "architecture", lambda x: "sm_90")
    q = torch.randn(2, 70, dim).half()
    k, v = (torch.randn(1 if keys else 2, keys or 70, dim).half() for _ in range(2))
    assert_right(
        lambda q, k, v: attention(q, k, v, num_heads=1), lambda q, k, v: attention_reference(q, k, v, 1), [q, k, v]
    )


@pytest.mark.slow
def test_scores_of_any_size():
    """exp2 of raw scores would overflow here; the running maximum keeps it from that."""
    q, k, v = (torch.randn(1, 600, 16) * size for size in (300, 1, 1))
    assert_right(
        lambda q, k, v: attention(q, k, v, num_heads=1), lambda q, k, v: attention_reference(q, k, v, 1), [q, k, v]
    )


def test_keys_of_a_frozen_text_cost_no_backward_pass(monkeypatch):
    launched, real = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *a, **k: launched.append(kernel.__name__) or real(kernel, *a, **k)
    )
    q, k, v = (torch.randn(n, size, 16) for n, size in ((4, 3), (2, 5), (2, 5)))
    found = []
    for leaves in ([q], [q, k, v], [k]):
        for x in (q, k, v):
            x.requires_grad_(any(x is leaf for leaf in leaves))
        out = attention(q, k, v, num_heads=2, backend="triton")
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert launched == ["single_pass_kernel", "queries_kernel"] + 2 * [
        "single_pass_kernel",
        "queries_kernel",
        "keys_kernel",
    ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[2][0], found[1][1])


def test_registration():
    q, k, v = (torch.randn(n, size, 16, requires_grad=True) for n, size in ((4, 3), (2, 5), (2, 5)))
    torch.library.opcheck(attention_op, (q, k, v, 2))
