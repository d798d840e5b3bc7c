"""Tiles around the network: a partition of unity; what knows no neighbours stays the same."""

import pytest
import torch

from animatediff.features.spatial_tiles import spatial_tiles
from animatediff.models.tiles import ramp, starts


@pytest.mark.parametrize(("side", "size"), [(64, 64), (65, 64), (96, 64), (128, 64), (100, 32), (33, 32), (10, 64)])
def test_partition_of_unity(side, size):
    """Normalised weights add up to 1 at every pixel, are above 0 in their tile, and 1 where it stands alone."""
    shares = []
    for first in starts(side, size, 1):
        end = min(first + size, side)
        weight = torch.zeros(side)
        weight[first:end] = ramp(end - first, first > 0, end < side)
        assert (weight[first:end] > 0).all()
        shares.append(weight)
    shares = torch.stack(shares) / torch.stack(shares).sum(dim=0)
    assert torch.allclose(shares.sum(dim=0), torch.ones(side), atol=1e-6)
    alone = (shares > 0).sum(dim=0) == 1
    assert (shares.amax(dim=0)[alone] == 1).all()
    assert shares.diff(dim=1).abs().amax() < 0.6  # none begins at its full weight


def test_predictions_pixel_by_pixel_are_the_same():
    seen = []

    def denoise(x, t, frames, **inputs):
        seen.append((tuple(x.shape), tuple(frames.tolist()), inputs))
        return 3 * x + t.reshape(-1, 1, 1, 1, 1) + frames.reshape(1, -1, 1, 1, 1)

    x, t, frames = torch.randn(2, 3, 4, 20, 27), torch.tensor([5.0, 7.0]), torch.arange(3)
    true = denoise(x, t, frames)
    seen.clear()
    with spatial_tiles(8)(denoise, None) as tiled:
        assert torch.allclose(tiled(x, t, frames, scale=1), true, atol=1e-5)
    assert {shape for shape, *_ in seen} == {(2, 3, 4, 8, 8)}
    assert all(rest == [(0, 1, 2), {"scale": 1}] for _, *rest in seen)
    assert len(seen) == 3 * 5
    seen.clear()
    with spatial_tiles(32)(denoise, None) as tiled:
        assert torch.equal(tiled(x, t, frames), true)
    assert [shape for shape, *_ in seen] == [(2, 3, 4, 20, 27)]


def test_tiles_that_know_their_place_are_blended():
    """A prediction that differs from tile to tile changes smoothly where they overlap."""
    count = iter(range(100))
    with spatial_tiles(16)(lambda x, t, frames: torch.full_like(x, float(next(count))), None) as tiled:
        line = tiled(torch.zeros(1, 1, 1, 16, 28), torch.zeros(1), torch.arange(1))[0, 0, 0, 0]
    assert line[:12].unique().tolist() == [0.0]
    assert line[-12:].unique().tolist() == [1.0]
    assert (line.diff() >= 0).all()
    assert line.diff().max() < 0.3
