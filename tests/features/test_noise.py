"""Noise of long clips: what its frames share, and that none is left out."""

import pytest
import torch

from animatediff.features.noise import arrange_noise


def arranged(kind, frames, *, length=16, stride=4, clips=1, seed=0):
    """Which frame of the independent noise each frame got, one list per clip."""
    noise = torch.arange(clips * frames, dtype=torch.float32).reshape(clips, frames, 1, 1, 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(clips)]
    out = arrange_noise(noise, kind, generators, length=length, stride=stride)
    assert out.shape == noise.shape
    return (out - noise[:, :1]).flatten(1).int().tolist()


@pytest.mark.parametrize("stride", [1, 4, 12, 16])
@pytest.mark.parametrize("frames", range(14, 41))
def test_shuffle(frames, stride):
    """Every window that begins with a block has each of the first frames' noise once; the order is another one."""
    (order,) = arranged("shuffle", frames, stride=stride)
    assert order[:16] == list(range(min(frames, 16))) and set(order) <= set(range(16))
    for start in range(0, frames - 15, stride):
        assert sorted(order[start : start + 16]) == list(range(16))
    if frames > 24 and stride > 1:
        assert order[16:] != [i % 16 for i in range(16, frames)]


def test_the_other_kinds():
    assert arranged("random", 20) == [list(range(20))]
    assert arranged("repeat", 20) == [[*range(16), 0, 1, 2, 3]]
    assert arranged("constant", 5) == [[0] * 5]


def test_every_clip_has_its_own_order():
    one, two = arranged("shuffle", 40, clips=2)
    assert one != two and arranged("shuffle", 40, seed=1) == [two]
