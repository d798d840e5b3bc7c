"""What the tolerances of the golden tests are worth: what rounding in float32 does, and not ten times as much."""

import pytest
import torch

from tests.models.test_golden import GOLDEN, TOLERANCE, base, files, golden, unets  # noqa: F401  its fixtures
from tests.rounding import Rounding, exact_and_bounds, worst


def spread(function, *inputs) -> float:
    """The relative error of one draw of what rounding does to thousands of numbers, whose norm is that of any draw."""
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = function(*inputs)
    with Rounding(torch.float32, torch.Generator().manual_seed(0)):
        rounded = function(*inputs)
    return ((rounded - exact).norm() / exact.norm()).item()


@pytest.mark.slow
@torch.no_grad()
def test_the_tolerance_of_a_unet_is_what_rounding_does(unets):  # noqa: F811
    unet = unets["v2"].double()
    moved = spread(unet, golden("input.latents"), torch.tensor([481, 481]), GOLDEN["text.last_hidden_state"])
    assert 2**0.5 * moved <= TOLERANCE <= 10 * moved  # the golden numbers were rounded, too


@pytest.mark.slow
@torch.no_grad()
def test_the_tolerance_of_a_vae_is_what_rounding_does(base):  # noqa: F811
    vae = base.vae.double()
    moved = spread(vae.decode, GOLDEN["input.latents"][:, :, 0])
    assert 2**0.5 * moved <= TOLERANCE <= 10 * moved


def test_rounding_of_a_sum_grows_with_its_length_and_its_condition():
    [(_, few)], [(_, many)] = (
        exact_and_bounds(lambda a, b: [a @ b], torch.ones(64, n).double(), torch.ones(n, 64).double() / n)
        for n in (16, 1600)
    )
    assert many.mean() / few.mean() == pytest.approx(10, rel=0.5)  # the square root of the length
    x = torch.rand(64, 64).double() + 1
    [(_, near)], [(_, far)] = (exact_and_bounds(lambda x, far: [(x + far) - far], x, d) for d in (0, 1000))
    assert 100 < far.mean() / near.mean() < 2000


def test_float32_is_within_and_float16_is_not():
    a, b = torch.randn(2, 64, 64)
    [(exact, bound)] = exact_and_bounds(lambda a, b: [(a @ b).softmax(-1)], a.double(), b.double())
    assert worst((a @ b).softmax(-1), exact, bound) <= 1
    assert worst((a.half().float() @ b.half().float()).softmax(-1), exact, bound) > 10
    assert worst(torch.full_like(a, torch.nan), exact, bound) == float("inf")
