"""Scribbles of pictures whose edges are known."""

import pytest
import torch

from animatediff.media.scribble import draw_scribbles, pack, unpack


def square(size: int) -> torch.Tensor:
    """A bright square in the middle half of a dark picture."""
    picture = torch.full((1, 3, size, size), -0.8)
    picture[..., size // 4 : -size // 4, size // 4 : -size // 4] = 0.6
    return picture


def test_a_square_is_its_outline():
    lines = draw_scribbles(square(64))[0]
    rows = lines[20:44].nonzero()[:, 1].unique().tolist()  # away from the corners: both pixels at each side
    assert rows == [15, 16, 47, 48]
    assert torch.equal(lines, lines.T) and torch.equal(lines, lines.flip(0)) and not lines[24:40, 24:40].any()


def test_colour_alone_is_an_edge_and_noise_is_not():
    red = torch.full((3, 32, 32), -1.0)
    red[0, :, :16], red[1, :, 16:] = 1.0, 1.0
    flat = 0.02 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    lines = draw_scribbles(torch.stack([red, flat]))
    assert lines[0, :, 15:17].all() and lines[0].sum() == 64 and not lines[1].any()


@pytest.mark.parametrize(("size", "width"), [(64, 2), (256, 4), (512, 6)])
def test_lines_grow_with_the_picture(size, width):
    assert draw_scribbles(square(size))[0, size // 2].sum() == 2 * width


def test_each_frame_is_drawn_for_itself():
    clip = torch.stack([square(64), torch.zeros(1, 3, 64, 64)], dim=1)
    drawn = draw_scribbles(clip)
    assert torch.equal(drawn[:, 0], draw_scribbles(square(64))) and not drawn[:, 1].any()


def test_packed_bits_come_back():
    lines = torch.rand(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    assert pack(lines).shape == (2, 3, 5, 2) and torch.equal(unpack(pack(lines), 12), lines)
