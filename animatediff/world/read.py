"""Reads colour, shape, background and motion back from a clip of Shapes, the toy data set, without knowing its labels.

Every frame is unmixed into body, ink and background, the body is compared with rotated templates (its dark mark tells
the direction), and the path of position, size and angle over the frames names the motion. The reading is strict: a
path that is neither calm nor one clean motion is "none", so that jitter and shuffled frames earn nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.metrics.video_metrics import loop_seam
from animatediff.utils import UserError
from animatediff.world.shapes import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    RADII,
    SHAPES,
    SIZE,
    TRAVEL,
    TURNS,
    Scene,
    shape_distance,
)

NONE = "none"  # the reading of what cannot be read
LABELS = ("color", "shape", "background", "motion")
OPPOSITES = {"right": "left", "down": "up", "grow": "shrink", "clockwise": "counter-clockwise"}

# What counts as a motion
MIN_AMPLITUDE = 0.4  # of the true motion
MIN_FIT = 0.8  # share of the variance that the motion explains
EARLY = np.arange(-1.5, 2.0, 0.5)  # frames by which a bounce may be early
CALM = np.array([1.6, 1.6, 0.09, 0.47])  # largest deviation of x, y (px), log radius and angle (rad) in a still clip
CALM_MOVING = 2 * CALM  # the same around the path of a moving clip

# What counts as a body. Colours are 8-bit RGB distances.
MAX_COLOR_DISTANCE = 60.0
MAX_BACKGROUND_DISTANCE = 50.0
MIN_PIXELS = 12  # of body in a frame
MIN_CORRELATION = 0.7  # with the best template, mean over the frames

ANGLES = 64  # rotations of a template
CROP = 24  # pixels of a template, both sides
REACH = 1.8  # half the side of a template, in radii of the disc with the body's area


@dataclass(frozen=True)
class Score:
    """What was read from one clip; a label that could not be read is "none".

    place: the motion that place and size show, however the shape is turned; a spin is "still". It can be read where the
        shape is too vague to tell how it is turned.
    amplitudes: signed size of every motion over the true one: `right`, `down`, `clockwise`, `grow` (negative for their
        opposites) and `bounce`.
    smoothness: 1 / (1 + j), where j pixels of independent jitter per frame would be as uneven, in position, size and
        angle together, as the clip is around the motion that was read; 1 is perfectly even.
    flicker: median over the pixels of the mean absolute change between neighbouring frames, on the scale of [-1, 1];
        most pixels are background, so it is about 0 in a rendered clip.
    change: the same as a mean over the pixels, the motion itself included.
    drift: share of the frames whose own colour, shape or background is not the clip's.
    seam: `video_metrics.loop_seam`; spins and bounces loop, other motions cannot. None in a clip that stands still.
    """

    color: str
    shape: str
    background: str
    motion: str
    place: str
    amplitudes: dict[str, float]
    smoothness: float
    flicker: float
    change: float
    drift: float
    seam: float | None

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Which of `color`, `shape`, `background` and `motion` are the scene's."""
        return {label: getattr(self, label) == getattr(scene, label) for label in LABELS}


@dataclass(frozen=True)
class _Templates:
    crops: Tensor  # (shapes * ANGLES, CROP * CROP), zero mean, unit norm
    offsets: np.ndarray  # (shapes, ANGLES, 2): from the body's centroid to the shape's centre, in body radii
    radius: np.ndarray  # (shapes,): shape radius / body radius


def score_clips(videos: Tensor) -> list[Score]:
    """`score_clip` of every clip in `videos` (n, 16, 3, 64, 64)."""
    return [score_clip(video) for video in videos]


@torch.no_grad()
def score_clip(video: Tensor) -> Score:
    """Read one clip.

    Args:
        video: (16, 3, 64, 64), range [-1, 1].

    Raises:
        UserError: another shape, or values that are not finite.
    """
    video = checked(video)
    steps = video.diff(dim=0).abs().mean(dim=(0, 1))
    pixels = (video + 1) * 127.5
    background, background_rgb, own_background = read_background(pixels)
    color, color_rgb, own_color = read_color(pixels)
    shape, own_shape, motion, place = NONE, np.full(FRAMES, NONE), NONE, NONE
    amplitudes, smoothness = dict.fromkeys((*OPPOSITES, "bounce"), 0.0), 0.0
    body = body_of(pixels, color_rgb, background_rgb)
    if color != NONE and visible(body):
        shape, own_shape, path, trust = read_path(body)
        motion, amplitudes, smoothness = _read_motion(path, trust, turns=TURNS)
        place, _, _ = _read_motion(path, trust, turns=TURNS, channels=3)
    same = (own_color == color) & (own_shape == shape) & (own_background == background)
    return Score(
        color,
        shape,
        background,
        motion,
        place,
        amplitudes,
        smoothness,
        flicker=float(steps.median()),
        change=float(steps.mean()),
        drift=float(1 - same.mean()),
        seam=loop_seam(video),
    )


def checked(video: Tensor) -> Tensor:
    """A clip (16, 3, 64, 64) on the CPU, float32, within [-1, 1].

    Raises:
        UserError: another shape, or values that are not finite.
    """
    if tuple(video.shape) != (FRAMES, 3, SIZE, SIZE):
        raise UserError(
            f"got a clip of shape {tuple(video.shape)}, expected ({FRAMES}, 3, {SIZE}, {SIZE}): generate "
            f"{FRAMES} frames at {SIZE}x{SIZE}, only those can be scored"
        )
    if not bool(video.isfinite().all()):
        raise UserError("got a clip with values that are not finite, expected [-1, 1]: try float32")
    return video.detach().cpu().float().clamp(-1, 1)


# Colours


def _palette(table: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(table.values())).float()


def read_background(pixels: Tensor) -> tuple[str, Tensor, np.ndarray]:
    """Name, RGB (3,) and the name in every frame (f,), from the median of the outer pixels."""
    edges = (pixels[..., :2, :], pixels[..., -2:, :], pixels[..., :2], pixels[..., -2:])
    ring = torch.cat([edge.flatten(2) for edge in edges], dim=2)
    per_frame = ring.median(dim=2).values
    rgb = per_frame.median(dim=0).values
    distance = (_palette(BACKGROUNDS) - rgb).norm(dim=1)
    name = list(BACKGROUNDS)[int(distance.argmin())] if distance.min() <= MAX_BACKGROUND_DISTANCE else NONE
    return name, rgb, np.array(list(BACKGROUNDS))[torch.cdist(per_frame, _palette(BACKGROUNDS)).argmin(dim=1)]


def read_color(pixels: Tensor) -> tuple[str, Tensor, np.ndarray]:
    """Name, RGB (3,) and the name in every frame (f,), from the pixels next to one of the body colours.

    Trails and halos are at most 0.55 opaque, which is nowhere close to another body colour.
    """
    flat = pixels.permute(1, 0, 2, 3).reshape(3, -1)
    palette = torch.cat([_palette(COLORS), _palette(BACKGROUNDS)])
    squares = torch.addmm(palette.square().sum(dim=1, keepdim=True), palette, flat, alpha=-2) + flat.square().sum(dim=0)
    smallest, nearest = squares.min(dim=0)
    bins = len(palette) + 1  # the last is for pixels far from all
    nearest[smallest > MAX_COLOR_DISTANCE**2] = bins - 1
    frame = torch.arange(len(pixels)).repeat_interleave(SIZE * SIZE)
    counts = torch.bincount(frame * bins + nearest, minlength=len(pixels) * bins).reshape(-1, bins)[:, : len(COLORS)]
    best = int(counts.sum(dim=0).argmax())
    own = np.array(list(COLORS))[counts.argmax(dim=1)]
    if counts[:, best].float().mean() < MIN_PIXELS:
        return NONE, torch.zeros(3), own
    return list(COLORS)[best], flat[:, nearest == best].median(dim=1).values, own


def visible(body: Tensor) -> bool:
    """Whether every frame shows some of a body (f, h, w)."""
    return bool((body.sum(dim=(1, 2)) >= MIN_PIXELS).all())


def body_of(pixels: Tensor, color: Tensor, background: Tensor) -> Tensor:
    """(f, h, w) in [0, 1]: where the body is opaque, its dark mark left out.

    A ramp on the colour's share drops the half-transparent trails and halos.
    """
    return ramp(unmix(pixels, color, background)[0])


def unmix(pixels: Tensor, color: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Shares a and b (f, h, w) of body and ink, the colour of comets, rings and shadows.

    Each pixel is background + a (color - background) + b (ink - background) by least squares.
    """
    ink = torch.full((3,), 30.0 if background.mean() > 102 else 217.0)
    basis = torch.stack([color - background, ink - background], dim=1)
    body, inked = torch.einsum("kc,fchw->kfhw", torch.linalg.pinv(basis), pixels - background[:, None, None])
    return body, inked


def ramp(share: Tensor) -> Tensor:
    """0 up to a share of 0.6, 1 from 0.9."""
    return ((share - 0.6) / 0.3).clamp(0, 1)


# Shape and pose


def _normalise(body: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroid (n, 2) and radius (n,) of the disc of the same area in pixels, and crops (n, CROP²) of that scale."""
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    area = body.sum(dim=(1, 2)).clamp(min=1e-6)
    center = torch.stack([(body.sum(1) * grid).sum(1), (body.sum(2) * grid).sum(1)], dim=1) / area[:, None]
    radius = (area / np.pi).sqrt()
    around = torch.linspace(-REACH, REACH, CROP)
    at = torch.stack(torch.meshgrid(around, around, indexing="xy"), dim=-1)
    at = center[:, None, None] + radius[:, None, None, None] * at
    crops = F.grid_sample(body[:, None], at / (SIZE / 2) - 1, align_corners=False).flatten(1)
    crops = crops - crops.mean(dim=1, keepdim=True)
    return center, radius, crops / crops.norm(dim=1, keepdim=True).clamp(min=1e-6)


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    middle, radius = SIZE / 2, 11.0
    offset = torch.arange(SIZE) + 0.5 - middle
    angle = (torch.arange(ANGLES) * (2 * np.pi / ANGLES))[:, None, None]
    x, y = offset[None, None, :], offset[None, :, None]
    u, v = x * angle.cos() + y * angle.sin(), -x * angle.sin() + y * angle.cos()
    mark = torch.hypot(u, v + 0.45 * radius) - 0.24 * radius
    distances = torch.stack([shape_distance(name, u, v, torch.tensor(radius)) for name in SHAPES])
    body = (0.5 - torch.maximum(distances, -mark)).clamp(0, 1)
    center, size, crops = _normalise(body.flatten(0, 1))
    offsets = ((middle - center) / size[:, None]).reshape(len(SHAPES), ANGLES, 2)
    return _Templates(crops, offsets.numpy(), radius / size.reshape(len(SHAPES), ANGLES).mean(1).numpy())


def read_path(body: Tensor) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """Shape, the shape in every frame (f,), x, y, log radius and angle (f, 4), and weights (f,) of the angles."""
    center, size, crops = _normalise(body)
    center, size = center.numpy(), size.numpy()
    templates = _templates()
    match = (crops @ templates.crops.T).reshape(len(body), len(SHAPES), ANGLES).numpy()
    by_shape = match.max(axis=2)
    votes = (by_shape * size[:, None]).sum(axis=0) / size.sum()  # larger is clearer
    index = int(votes.argmax())
    own = np.array(SHAPES)[by_shape.argmax(axis=1)]
    match = match[:, index]
    best = match.argmax(axis=1)
    frames = np.arange(len(body))
    low, mid, high = (match[frames, (best + step) % ANGLES] for step in (-1, 0, 1))
    peak = 0.5 * (low - high) / np.minimum(low - 2 * mid + high, -1e-9)
    angle = (best + peak) * (2 * np.pi / ANGLES)
    center = center + size[:, None] * templates.offsets[index, best]
    path = np.column_stack([center, np.log(size * templates.radius[index]), angle])
    trust = np.maximum(mid - match.mean(axis=1), 1e-9)
    return SHAPES[index] if votes[index] >= MIN_CORRELATION else NONE, own, path, trust / trust.sum()


# Motion


def explain(values: np.ndarray, basis: np.ndarray) -> tuple[float, float]:
    """Least-squares factor of `basis` in `values`, both (f,) and centred here, and the share of variance explained."""
    values, basis = values - values.mean(), basis - basis.mean()
    product, power = float(values @ basis), float(basis @ basis)
    return product / power, product**2 / (power * max(float(values @ values), 1e-9))


def _turning(angle: np.ndarray, trust: np.ndarray) -> tuple[float, float]:
    """Turns per clip (clockwise is positive) and squared resultant length of the angles once they are turned back."""
    turns = np.linspace(-2, 2, 161)
    back = np.exp(1j * (angle - 2 * np.pi / FRAMES * turns[:, None] * np.arange(FRAMES)))
    power = np.abs(back @ trust) ** 2
    return float(turns[power.argmax()]), float(power.max())


def _fit_motions(path: np.ndarray, trust: np.ndarray, turns: float) -> dict[str, tuple[float, float, np.ndarray]]:
    """Motion -> amplitude over the true one, share of its coordinate that it explains, its own path (f, 4)."""
    time, k = np.linspace(-0.5, 0.5, FRAMES), np.arange(FRAMES)
    hops = [-TRAVEL * np.abs(np.cos(np.pi * (k + early) / (FRAMES / 2))) for early in EARLY]
    true = {
        "right": (0, TRAVEL * time),
        "down": (1, TRAVEL * time),
        "grow": (2, np.log(RADII[1] / RADII[0]) * time),
        "clockwise": (3, 2 * np.pi * turns / FRAMES * k),
        "bounce": (1, max(hops, key=lambda hop: explain(path[:, 1], hop)[1])),
    }
    found = {}
    for name, (channel, basis) in true.items():
        amplitude, fit = _turning(path[:, 3], trust) if channel == 3 else explain(path[:, channel], basis)
        if channel == 3:
            amplitude /= turns
        found[name] = amplitude, fit, amplitude * np.eye(4)[channel] * basis[:, None]
    return found


def _read_motion(
    path: np.ndarray, trust: np.ndarray, *, turns: float, channels: int = 4
) -> tuple[str, dict[str, float], float]:
    """Motion, amplitudes and smoothness of a path (f, 4); the motion is read from the first `channels`."""
    found = _fit_motions(path, trust, turns)
    amplitudes = {name: amplitude for name, (amplitude, _, _) in found.items()}
    clean = [
        name
        for name, (amplitude, fit, own) in found.items()
        if (amplitude if name == "bounce" else abs(amplitude)) >= MIN_AMPLITUDE
        and fit >= MIN_FIT
        and own[:, :channels].any()
    ]
    winner = max(clean, key=lambda name: abs(amplitudes[name]), default=None)
    rest = path - found[winner][2] if winner else path
    smoothness = 1 / (1 + _unevenness(rest))
    resultant = np.clip(abs(np.exp(1j * rest[:, 3]) @ trust), 1e-9, 1)
    deviation = np.append(rest[:, :3].std(axis=0), np.sqrt(-2 * np.log(resultant)))
    if (deviation > (CALM_MOVING if winner else CALM))[:channels].any():
        return NONE, amplitudes, smoothness
    if winner is None:
        return "still", amplitudes, smoothness
    return winner if amplitudes[winner] > 0 else OPPOSITES[winner], amplitudes, smoothness


def _unevenness(path: np.ndarray) -> float:
    """Pixels of independent jitter per frame whose second differences would be as large as those of a path (f, 4)."""
    steps = np.diff(path, axis=0)
    steps[:, 3] = np.angle(np.exp(1j * steps[:, 3]))
    steps[:, 2:] *= np.exp(path[:, 2].mean()) * np.array([1, 0.5])  # at the edge, and at half the radius: the mark
    return float(np.sqrt(np.square(np.diff(steps, axis=0)).sum(axis=1).mean() / 6))
