"""The temporal attention kernels, in Triton's interpreter."""

import pytest
import torch
from animatediff_kernels import launch, temporal_attention, use_backend
from animatediff_kernels.temporal_attention.op import temporal_attention_op
from animatediff_kernels.temporal_attention.reference import temporal_attention_reference

from tests.kernels.checks import DTYPES, assert_right

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = [  # clips, frames, tokens, heads, head_dim
    pytest.param(2, 16, 9, 8, 40, id="512x512, level 0: width 32 + 16"),
    pytest.param(1, 16, 4, 8, 80, id="level 1: width 64 + 16"),
    pytest.param(1, 16, 3, 8, 160, id="levels 2 and 3: width 128 + 32"),
    pytest.param(2, 1, 5, 8, 40, id="one frame: an image"),
    pytest.param(1, 13, 7, 8, 40, id="13 frames: a masked tile"),
    pytest.param(1, 24, 5, 8, 80, id="24 frames: v1's longest clip"),
    pytest.param(1, 32, 3, 8, 40, id="32 frames: v2's longest clip"),
    pytest.param(1, 5, 300, 3, 4, id="the smallest width, an odd number of heads, more pixels than a program takes"),
    pytest.param(1, 2, 1, 1, 64, id="one head as wide as a tile"),
]


def projected(clips, frames, tokens, heads, dim, dtype):
    """Queries, keys and values, slices of one tensor."""
    return list(torch.randn(clips * frames, tokens, 3 * heads * dim).to(dtype).chunk(3, -1))


@DTYPES
@pytest.mark.parametrize(("clips", "frames", "tokens", "heads", "dim"), SHAPES)
def test_temporal_attention(clips, frames, tokens, heads, dim, dtype):
    assert_right(
        lambda q, k, v: temporal_attention(q, k, v, frames=frames, num_heads=heads),
        lambda q, k, v: temporal_attention_reference(q, k, v, frames, heads),
        projected(clips, frames, tokens, heads, dim, dtype),
    )


def test_64_frames_in_half_precision():
    assert_right(
        lambda q, k, v: temporal_attention(q, k, v, frames=64, num_heads=2),
        lambda q, k, v: temporal_attention_reference(q, k, v, 64, 2),
        projected(1, 64, 2, 2, 40, torch.float16),
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x, id="contiguous"),
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="channels not side by side"),
        pytest.param(lambda x: x.repeat(1, 1, 3)[..., : x.shape[-1]], id="slices of one tensor"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded"),
    ],
)
def test_separate_inputs_of_any_layout(layout):
    q, k, v = (layout(torch.randn(16, 6, 4 * 20)) for _ in range(3))
    assert_right(
        lambda *qkv: temporal_attention(*qkv, frames=8, num_heads=4),
        lambda *qkv: temporal_attention_reference(*qkv, 8, 4),
        [q, k, v.contiguous()],  # of another layout than the others
    )


@pytest.mark.slow
@pytest.mark.parametrize("dim", [40, 80, 160])
def test_the_launches_of_a_gpu_compute_the_same(monkeypatch, dim):
    monkeypatch.setattr(launch, "architecture", lambda x: "sm_90")
    assert_right(
        lambda q, k, v: temporal_attention(q, k, v, frames=3, num_heads=6),
        lambda q, k, v: temporal_attention_reference(q, k, v, 3, 6),
        projected(2, 3, 2, 6, dim, torch.float16),
    )


@pytest.mark.slow
def test_more_rows_than_a_grid_axis_takes(monkeypatch):
    """65,535 ends the second and third axis of a CUDA grid; the kernels use the first alone."""
    programs = []
    real = launch.run

    def run(kernel, count, *args, **constants):
        programs.append(count)
        real(kernel, count, *args, **constants)

    monkeypatch.setattr(launch, "run", run)
    tokens, heads = 16_500, 4
    qkv = projected(1, 2, tokens, heads, 4, torch.float32)
    with use_backend("triton"):
        out = temporal_attention(*qkv, frames=2, num_heads=heads)
    assert tokens * heads > 65_535 and programs == [33]  # one axis, so one number
    assert torch.allclose(out, temporal_attention_reference(*qkv, 2, heads), atol=1e-5)


def test_registration():
    qkv = [torch.randn(6, 2, 16, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(temporal_attention_op, (*qkv, 3, 2))
