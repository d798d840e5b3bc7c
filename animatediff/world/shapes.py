"""Shapes, the toy data set: 16-frame clips of a coloured shape doing one thing, drawn from signed distances.

Everything about a clip is known (`Scene`), so a generated clip can be scored exactly. As in photographs, each still
frame hints at the action (a trail behind a moving shape, a comet around a spinning one, a halo, a ring, a shadow), so a
text-to-image model can learn the action words from single frames.

Spins are half a turn, of shapes other than circles. Their hint, a thick comet on the right or on the left, stays where
it is while the shape turns, and the captions of the two directions have different words: so they can be told apart at
high noise, where a sampler decides what moves how.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 64  # pixels, both sides
FRAMES = 16
FPS = 8

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 170, 70),
    "cyan": (40, 205, 220),
    "blue": (40, 70, 225),
    "purple": (130, 50, 190),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 16),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
    "beige": (222, 203, 164),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, float] = {"small": 8.5, "large": 12.5}  # radius in pixels
MOTIONS: dict[str, tuple[str, ...]] = {
    "still": ("standing still", "not moving", "staying still"),
    "left": ("moving left", "sliding to the left", "going left"),
    "right": ("moving right", "sliding to the right", "going right"),
    "up": ("moving up", "rising upwards", "going up"),
    "down": ("moving down", "sinking downwards", "going down"),
    "clockwise": ("spinning clockwise", "rotating clockwise", "turning clockwise"),
    "counter-clockwise": (
        "spinning backwards",
        "rotating backwards",
        "turning backwards",
        "spinning counter-clockwise",
    ),
    "grow": ("growing", "getting bigger", "expanding"),
    "shrink": ("shrinking", "getting smaller", "contracting"),
    "bounce": ("bouncing", "bouncing up and down", "hopping"),
}
TURNS = 0.5  # of a spin over a clip
SPINS = ("clockwise", "counter-clockwise")  # of large shapes near the middle, from upright on: they can be drawn well
TEMPLATES = (
    "a {size} {color} {shape} {motion} on a {background} background",
    "{size} {color} {shape}, {motion}, {background} background",
    "a {color} {shape} {motion} on a {background} background",
    "a {color} {shape} is {motion} over {background}",
)
TRAVEL = 28.0  # pixels covered by left, right, up, down, and the height of a bounce
RADII = (6.0, 17.0)  # of growing shapes, first and last frame
FLOOR = 57.0  # where bouncing shapes land
COMET_RING, COMET_GAP = 1.3, 5.0  # radius of the comet's path: radii of the shape, and pixels
COMET_WIDTH = 4.5  # pixels, half the thickness of its head
COMET_HEAD = 1.9  # radians clockwise from the top
COMET_LENGTH = 3.8  # radians
ZOOM = 2.0  # over a clip, of the whole picture: the camera's moves are in camera.py
ORBIT = 9.0  # pixels, the radius of the circle that the picture moves on


@dataclass(frozen=True)
class Scene:
    """Exact labels of one clip. `x, y` is the middle of the path in pixels, `angle` the tilt at frame 0 in radians."""

    shape: str
    color: str
    size: str  # "" for growing and shrinking shapes
    background: str
    motion: str
    x: float
    y: float
    angle: float
    caption: str


def make_scene(
    index: int,
    *,
    seed: int = 0,
    shape: str | None = None,
    color: str | None = None,
    background: str | None = None,
    motion: str | None = None,
) -> Scene:
    """The scene with number `index` of the endless series `seed`; the same on every machine.

    Labels given by name replace the drawn ones. A circle that would spin is another shape, unless it is given.
    """
    rng = np.random.Generator(np.random.PCG64([seed, index]))

    def pick(options, given: str | None = None) -> str:
        drawn = list(options)[int(rng.integers(len(options)))]
        return drawn if given is None else given

    given_shape = shape
    shape, color = pick(SHAPES, shape), pick(COLORS, color)
    background, motion = pick(BACKGROUNDS, background), pick(MOTIONS, motion)
    size = "" if motion in ("grow", "shrink") else pick(SIZES, "large" if motion in SPINS else None)
    near, far = (29.0, 35.0), (21.0, 43.0)  # of the middle of the picture
    x = rng.uniform(*(near if motion in ("left", "right", *SPINS) else far))
    y = rng.uniform(*(near if motion in ("up", "down", *SPINS) else far))
    angle = rng.uniform(-0.15, 0.15) * (motion not in SPINS)
    words = {
        "size": size,
        "color": color,
        "shape": shape,
        "background": background,
        "motion": pick(MOTIONS[motion]),
    }
    template = pick(TEMPLATES)
    if motion in SPINS and given_shape is None and shape == "circle":
        shape = words["shape"] = pick([name for name in SHAPES if name != "circle"])
    caption = " ".join(template.format(**words).split())
    return Scene(shape, color, size, background, motion, float(x), float(y), float(angle), caption)


def poses(scene: Scene) -> np.ndarray:
    """(16, 4): x, y in pixels, radius in pixels, angle in radians (clockwise) of every frame."""
    k, path = np.arange(FRAMES), np.linspace(-0.5, 0.5, FRAMES)
    x, y = np.full(FRAMES, scene.x), np.full(FRAMES, scene.y)
    radius, angle = np.full(FRAMES, SIZES.get(scene.size, RADII[1])), np.full(FRAMES, scene.angle)
    match scene.motion:
        case "left" | "right":
            x = x + path * TRAVEL * (1 if scene.motion == "right" else -1)
        case "up" | "down":
            y = y + path * TRAVEL * (1 if scene.motion == "down" else -1)
        case "clockwise" | "counter-clockwise":
            angle = angle + 2 * np.pi * TURNS * k / FRAMES * (1 if scene.motion == "clockwise" else -1)
        case "grow":
            radius = RADII[0] * (RADII[1] / RADII[0]) ** (path + 0.5)
        case "shrink":
            radius = RADII[1] * (RADII[0] / RADII[1]) ** (path + 0.5)
        case "bounce":
            y = FLOOR - radius - TRAVEL * np.abs(np.cos(np.pi * k / (FRAMES / 2)))
        case "zoom_in" | "zoom_out":
            zoom = ZOOM ** (path if scene.motion == "zoom_in" else -path)
            x, y, radius = SIZE / 2 + (x - SIZE / 2) * zoom, SIZE / 2 + (y - SIZE / 2) * zoom, radius * zoom
        case "orbit":
            x, y = x + ORBIT * np.cos(2 * np.pi * k / FRAMES), y + ORBIT * np.sin(2 * np.pi * k / FRAMES)
    return np.stack([x, y, radius, angle], axis=1)


def shape_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of an upright shape at the origin; y points down."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.87 * radius
    if shape == "triangle":
        slanted = x.abs() * np.cos(np.pi / 6) - y * np.sin(np.pi / 6)
        return torch.maximum(slanted, y) - 0.6 * radius
    if shape == "cross":
        ax, ay = x.abs(), y.abs()
        bar_h = torch.maximum(ax - 1.05 * radius, ay - 0.38 * radius)
        bar_v = torch.maximum(ay - 1.05 * radius, ax - 0.38 * radius)
        return torch.minimum(bar_h, bar_v)
    if shape == "star":
        sector = 2 * np.pi / 5
        theta = torch.atan2(x, -y)  # 0 at the upper tip
        theta = (theta - sector * torch.round(theta / sector)).abs()
        length = torch.hypot(x, y)
        px, py = length * torch.cos(theta), length * torch.sin(theta)
        outer, inner = 1.25, 0.58
        ix, iy = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
        nx, ny = iy, outer - ix  # normal of the edge tip -> notch, pointing outwards
        norm = float(np.hypot(nx, ny))
        return (nx * px + ny * py) / norm - radius * (nx * outer / norm)
    raise ValueError(f"got shape {shape!r}, expected one of {', '.join(SHAPES)}")


def cover(distance: Tensor, softness: float = 1.0) -> Tensor:
    """Antialiased coverage in [0, 1] from a signed distance in pixels."""
    return (0.5 - distance / softness).clamp(0, 1)


def over(canvas: Tensor, color: Tensor, alpha: Tensor) -> Tensor:
    return canvas + (color - canvas) * alpha.unsqueeze(-3)


def _comet(x: Tensor, y: Tensor, radius: Tensor, sign: float) -> Tensor:
    """Coverage of a thick arc around the shape that tapers to its tail: sign 1 runs clockwise over the top to its head
    on the right, -1 is its mirror image. It does not turn with the shape, so the mean of all frames shows it too.
    """
    ring, ahead = COMET_RING * radius + COMET_GAP, torch.tensor(COMET_HEAD)
    lag = torch.remainder(ahead - torch.atan2(sign * x, -y), 2 * torch.pi)  # angle behind the head
    tail = (torch.hypot(x, y) - ring).abs() - COMET_WIDTH * (1 - lag / COMET_LENGTH)
    head = torch.hypot(sign * x - ring * ahead.sin(), y + ring * ahead.cos()) - COMET_WIDTH
    return torch.maximum(cover(tail) * (lag < COMET_LENGTH), cover(head))


def _hint(canvas: Tensor, motion: str, color: Tensor, ink: Tensor, x: Tensor, y: Tensor, pose: Tensor) -> Tensor:
    """Draw what gives the action away in a still frame. x, y: pixel offsets from the shape's centre (n, f, H, W)."""
    radius = pose[..., 2, None, None]
    if motion in ("left", "right", "up", "down"):
        along, across = (x, y) if motion in ("left", "right") else (y, x)
        behind = along if motion in ("left", "up") else -along
        fade = torch.exp(-(behind - radius).clamp(min=0) / 7) * (behind > 0)
        return over(canvas, color, 0.5 * fade * cover(across.abs() - 0.55 * radius))
    if motion in ("clockwise", "counter-clockwise"):
        return over(canvas, ink, 0.85 * _comet(x, y, radius, 1.0 if motion == "clockwise" else -1.0))
    if motion == "grow":
        return over(canvas, color, 0.55 * torch.exp(-(torch.hypot(x, y) - radius).clamp(min=0) / 4))
    if motion == "shrink":
        return over(canvas, ink, 0.8 * cover((torch.hypot(x, y) - (radius + 7)).abs() - 0.8))
    if motion == "bounce":
        height = (FLOOR - pose[..., 1, None, None] - radius) / TRAVEL
        below = y + pose[..., 1, None, None] - (FLOOR + 1.5)
        width = radius * (1 - 0.4 * height)
        return over(canvas, ink, (0.7 - 0.35 * height) * cover((torch.hypot(x, below * 4) - width) / 2))
    return canvas


class Style:
    """How scenes are painted: this is the plain look, others are in styles.py.

    Colours are RGB in [0, 1], (n, 1, 3, 1, 1); canvases (n, f, 3, H, W); distances in pixels (n, f, H, W).
    """

    def palette(self, color: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        return color, background

    def body(self, canvas: Tensor, color: Tensor, distance: Tensor, mark: Tensor) -> Tensor:
        """Paint the shape and its mark, each given by a signed distance, over the canvas."""
        canvas = over(canvas, color, cover(distance))
        return over(canvas, torch.full_like(color, 0.07), cover(mark))

    def finish(self, canvas: Tensor) -> Tensor:
        return canvas


PLAIN = Style()


def render(scenes: list[Scene], *, only_frames: np.ndarray | None = None, style: Style = PLAIN) -> Tensor:
    """Draw clips, float32 in [-1, 1].

    Returns (n, 16, 3, 64, 64), or (n, k, 3, 64, 64) where `only_frames` (n, k) names the frames of each clip to draw.
    """
    pose_of = np.stack([poses(scene) for scene in scenes])
    if only_frames is not None:
        pose_of = np.take_along_axis(pose_of, only_frames[:, :, None], axis=1)
    frames = pose_of.shape[1]
    out = torch.empty(len(scenes), frames, 3, SIZE, SIZE)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, scene in enumerate(scenes):
        groups.setdefault((scene.shape, scene.motion), []).append(i)
    for (shape, motion), members in groups.items():
        color = _rgb(COLORS, [scenes[i].color for i in members])
        background = _rgb(BACKGROUNDS, [scenes[i].background for i in members])
        pose = torch.from_numpy(pose_of[members]).float()
        out[members] = draw(pose, color, background, shape=shape, motion=motion, style=style)
    return out


def _rgb(table: dict[str, tuple[int, int, int]], names: list[str]) -> Tensor:
    return torch.tensor([table[name] for name in names]).float().div(255)[:, None, :, None, None]


def draw(
    pose: Tensor,
    color: Tensor,
    background: Tensor,
    *,
    shape: str,
    motion: str,
    style: Style = PLAIN,
) -> Tensor:
    """Frames (n, f, 3, 64, 64), range [-1, 1], of one shape with the hint of one motion.

    Args:
        pose: (n, f, 4), see `poses`.
        color, background: RGB in [0, 1], (n, 1, 3, 1, 1).
    """
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    color, background = style.palette(color, background)
    ink = torch.where(background.mean(2, keepdim=True) > 0.4, 0.12, 0.85).expand_as(background)
    x = grid[None, :] - pose[..., 0, None, None]
    y = grid[:, None] - pose[..., 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    canvas = background.expand(-1, pose.shape[1], -1, SIZE, SIZE)
    canvas = _hint(canvas, motion, color, ink, x, y, pose)
    radius, angle = pose[..., 2, None, None], pose[..., 3, None, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = x * cos + y * sin, -x * sin + y * cos  # undo the rotation
    mark = torch.hypot(u, v + 0.45 * radius) - 0.24 * radius  # a dark spot shows how a circle is turned
    canvas = style.body(canvas, color, shape_distance(shape, u, v, radius), mark)
    return style.finish(canvas) * 2 - 1
