"""Reads which motion a still frame of Shapes, the toy data set, hints at: a check of an image model on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.world.read import NONE, body_of, read_background, read_color, read_path, visible
from animatediff.world.shapes import BACKGROUNDS, COLORS, MOTIONS, draw

EDGE = 3  # pixels around the shape that are not compared: how soft it is drawn is no hint
BLUR = 9  # pixels, both sides, over which differences are averaged: thin lines and vague places need not fit exactly


@torch.no_grad()
def read_hint(frame: Tensor) -> str:
    """The motion whose hint, drawn around the shape that is seen, comes nearest to the frame outside the shape's edge.

    Args:
        frame: (3, 64, 64), range [-1, 1].

    Returns:
        A key of MOTIONS, or "none" where no shape can be seen.
    """
    frame = frame.detach().cpu().float().clamp(-1, 1)
    pixels = (frame[None] + 1) * 127.5
    background, background_rgb, _ = read_background(pixels)
    color, color_rgb, _ = read_color(pixels)
    body = body_of(pixels, color_rgb, background_rgb)
    if NONE in (color, background) or not visible(body):
        return NONE
    outside = 1 - F.max_pool2d(body[None], 2 * EDGE + 1, stride=1, padding=EDGE)[0]
    _, own, path, _ = read_path(body)
    pose = torch.from_numpy(path).float()[None]
    pose[..., 2] = pose[..., 2].exp()
    rgb = [
        torch.tensor(value).div(255.0)[None, None, :, None, None] for value in (COLORS[color], BACKGROUNDS[background])
    ]
    drawn = torch.cat([draw(pose, *rgb, shape=str(own[0]), motion=name)[0] for name in MOTIONS])
    differences = F.avg_pool2d((drawn - frame) * outside, BLUR, stride=1)
    return list(MOTIONS)[int(differences.square().mean(dim=(1, 2, 3)).argmin())]
