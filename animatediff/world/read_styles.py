"""Reads styles and watermarks of Shapes, the toy data set, and undoes a style for the scorer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.world.read import Score, checked, ramp, read_background, read_color, score_clip, unmix
from animatediff.world.shapes import SIZE
from animatediff.world.styles import BAND, BLOCK, LETTERS, NIGHT, PASTEL, STYLES, strokes, watermark

HOLLOW = 0.25  # share of a neon shape that its outline does not cover
PALE = 0.36  # brightness of the darkest pixels
BLOCKY = 0.94  # change within blocks over change between blocks
STROKED = 0.22  # correlation of its gaps with the hatching
SHARPEN = 1.2  # of what was in blocks
STAMPED = 0.4  # correlation with the watermark


@torch.no_grad()
def read_style(video: Tensor) -> str:
    """The key of STYLES that a clip (16, 3, 64, 64), range [-1, 1], looks like."""
    found = style_signs(without_watermark(checked(video)))
    if found["pale"] > PALE and found["blocky"] < BLOCKY:
        return "pixelated"
    if found["stroked"] > STROKED:
        return "hatched"
    return "neon" if found["hollow"] > HOLLOW else "plain"


def style_signs(video: Tensor) -> dict[str, float]:
    """What `read_style` decides by, each at most about 1 (see the thresholds)."""
    outline, filled, _ = _neon_shape(video)
    steps = sum(video.diff(dim=d).abs().transpose(d, -1).mean(dim=(0, 1, 2)) for d in (2, 3))
    between = torch.arange(1, SIZE) % BLOCK == 0
    body = F.max_pool2d(outline[:, None], 5, stride=1, padding=2)[:, 0]  # and the strokes in it
    return {
        "hollow": float((filled - outline).clamp(min=0).sum() / filled.sum().clamp(min=1)),
        "pale": float(torch.quantile(video.mean(dim=1).flatten(1), 0.001, dim=1).median()) / 2 + 0.5,
        "blocky": float((steps[~between].mean() + 1e-3) / (steps[between].mean() + 1e-3)),
        "stroked": -_correlation(_fine(outline, body), _fine(strokes().expand_as(body), body)),
    }


def read_watermark(video: Tensor) -> float:
    """How clearly the watermark is to be seen in a clip (16, 3, 64, 64), range [-1, 1]: 1 clearly, 0 not at all."""
    band, letters = watermark()
    rows = band.any(dim=1)
    still = checked(video).mean(dim=1).median(dim=0).values
    return _correlation(_fine(still[None], band[None])[:, rows], _fine(letters[None], band[None])[:, rows])


def has_watermark(video: Tensor) -> bool:
    """Whether the watermark can be read."""
    return read_watermark(video) > STAMPED


def without_watermark(video: Tensor) -> Tensor:
    """A clip (16, 3, 64, 64), range [-1, 1], with its watermark, if it can be read, subtracted as it was laid on."""
    if not has_watermark(video):
        return video
    band, letters = (opacity * where for opacity, where in zip((BAND, LETTERS), watermark(), strict=True))
    return (((video - letters) / (1 - letters) + band) / (1 - band)).clamp(-1, 1)


def watermark_rate(videos: Sequence[Tensor]) -> float:
    """Percent of the clips whose watermark can be read."""
    return 100 * sum(map(has_watermark, videos)) / len(videos)


@torch.no_grad()
def score_styled(video: Tensor, style: str) -> Score:
    """`score_clip` of what a clip (16, 3, 64, 64), range [-1, 1], in a style shows; see `beneath`."""
    return score_clip(beneath(video, style))


@torch.no_grad()
def beneath(video: Tensor, style: str) -> Tensor:
    """A clip (16, 3, 64, 64), range [-1, 1], in the plain look, less the watermark if it has one.

    Args:
        style: the key of STYLES that it is in.
    """
    return UNDO[style](without_watermark(checked(video)))


# ---- what a style looks like, and what is beneath


def _neon_shape(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outline, filled shape and lamp, each (f, h, w) in [0, 1]. Filled is what has outline on all four sides."""
    pixels = (video + 1) * 127.5
    _, background, _ = read_background(pixels)
    _, color, _ = read_color(pixels)
    outline, lit = unmix(pixels, color, background)
    sides = [outline.flip(d).cummax(d).values.flip(d) for d in (1, 2)] + [outline.cummax(d).values for d in (1, 2)]
    filled = ramp(torch.stack(sides).amin(dim=0))
    return ramp(outline), filled, filled * ramp(lit + 0.2)


def _plain_of_neon(video: Tensor) -> Tensor:
    pixels = (video + 1) * 127.5
    _, background, _ = read_background(pixels)
    _, color, _ = read_color(pixels)
    _, filled, lamp = _neon_shape(video)
    color, background = color[:, None, None], background[:, None, None] / NIGHT
    body = background + (color - background) * filled[:, None]
    return (body * (1 - lamp[:, None])).clamp(0, 255) / 127.5 - 1


def _plain_of_hatched(video: Tensor) -> Tensor:
    """Strokes are filled with what lies between them."""
    weight = (1 - strokes()) ** 2
    return _blurred(video * weight) / _blurred(weight.expand(1, 1, -1, -1))


def _plain_of_pixelated(video: Tensor) -> Tensor:
    blocks = F.avg_pool2d(((video + 1) / 2 - PASTEL) / (1 - PASTEL), BLOCK)
    smooth = F.interpolate(blocks, scale_factor=BLOCK, mode="bicubic")
    return (smooth + SHARPEN * (smooth - _blurred(smooth, 2.5))).clamp(0, 1) * 2 - 1


UNDO = {
    "plain": lambda video: video,
    "neon": _plain_of_neon,
    "hatched": _plain_of_hatched,
    "pixelated": _plain_of_pixelated,
}
assert UNDO.keys() == STYLES.keys()


def _blurred(image: Tensor, sigma: float = 1.3) -> Tensor:
    """(n, c, h, w) through a Gaussian."""
    around = torch.arange(-4, 5).float()
    kernel = torch.exp(-around.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)
    image = F.conv2d(F.pad(image, (4, 4, 0, 0), mode="replicate"), kernel, groups=image.shape[1])
    return F.conv2d(F.pad(image, (0, 0, 4, 4), mode="replicate"), kernel.mT, groups=image.shape[1])


def _fine(image: Tensor, where: Tensor) -> Tensor:
    """An image (f, h, w) less its blur within `where`, 0 outside."""
    blur = _blurred(image[:, None] * where[:, None], 3.0) / _blurred(where[:, None], 3.0).clamp(min=1e-6)
    return (image - blur[:, 0]) * where


def _correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-6))
