"""Tiles: they cover a picture, their weights make a partition of unity, and what knows no neighbours stays the same."""

import pytest
import torch

from animatediff.features.tiles import tile_spans, tile_weights, tiles

CASES = [(64, 64, 16), (65, 64, 16), (96, 64, 16), (128, 64, 16), (100, 32, 0), (33, 32, 31), (10, 64, 16)]


@pytest.mark.parametrize(("side", "size", "overlap"), CASES)
def test_spans_cover_a_side(side, size, overlap):
    spans = tile_spans(side, size, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == side
    assert {end - first for first, end in spans} == {min(side, size)}
    for (_, end), (first, _) in zip(spans[:-1], spans[1:], strict=True):
        assert end - first >= overlap


@pytest.mark.parametrize(("side", "size", "overlap"), CASES)
def test_partition_of_unity(side, size, overlap):
    """Normalised weights add up to 1 at every pixel, each is above 0, and they are 1 where a tile stands alone."""
    total, shares = torch.zeros(side), []
    for first, end in tile_spans(side, size, overlap):
        weight = torch.zeros(side)
        weight[first:end] = tile_weights(first, end, side, overlap)
        assert (weight[first:end] > 0).all()
        shares.append(weight)
        total += weight
    shares = torch.stack(shares) / total
    assert torch.allclose(shares.sum(dim=0), torch.ones(side), atol=1e-6)
    alone = (shares > 0).sum(dim=0) == 1
    assert (shares.amax(dim=0)[alone] == 1).all()
    if overlap > 1 and side > size:
        assert shares.diff(dim=1).abs().max() < 0.6  # no tile begins at its full weight


def test_predictions_pixel_by_pixel_are_the_same():
    seen = []

    def denoise(x, t, frames, **inputs):
        seen.append((tuple(x.shape), inputs))
        return 3 * x + t.reshape(-1, 1, 1, 1, 1)

    x, t = torch.randn(2, 3, 4, 20, 27), torch.tensor([5.0, 7.0])
    with tiles(8, 2)(denoise, None) as tiled:
        assert torch.allclose(tiled(x, t, torch.arange(3), scale=1), denoise(x, t, None), atol=1e-5)
    assert {shape for shape, _ in seen[:-1]} == {(2, 3, 4, 8, 8)}
    assert all(inputs == {"scale": 1} for _, inputs in seen[:-1])
    assert len(seen) - 1 == 3 * 5
    seen.clear()
    with tiles(32, 8)(denoise, None) as tiled:
        tiled(x, t, torch.arange(3))
    assert [shape for shape, _ in seen] == [(2, 3, 4, 20, 27)]


def test_tiles_that_know_their_place_are_blended():
    """A prediction that differs from tile to tile changes smoothly across the overlap."""
    count = iter(range(100))
    with tiles(16, 8)(lambda x, t, frames: torch.full_like(x, float(next(count))), None) as tiled:
        line = tiled(torch.zeros(1, 1, 1, 16, 24), torch.zeros(1), torch.arange(1))[0, 0, 0, 0]
    assert line[:8].unique().tolist() == [0.0]
    assert line[-8:].unique().tolist() == [1.0]
    assert (line.diff() >= 0).all()
    assert line.diff().max() < 0.15
