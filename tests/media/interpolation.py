"""How frames between frames are best made: python -m tests.media.interpolation [SCENES] [CLIP …]

Every clip has frames that are known: Shapes drawn at twice its rate, a texture under a moving camera, and the clips
given. Every second frame is taken out, made again from its neighbours, and compared: PSNR in dB. docs/finishing.md has
the outcome.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.media.interpolate import interpolate
from animatediff.media.video import read_video
from animatediff.world import shapes

Method = Callable[[Tensor], Tensor]  # uint8 (f, 3, H, W) -> the f - 1 frames between
AROUND = 4  # frames that minterpolate is given before the first and after the last, as it leaves some out


def scene_clip(motion: str, index: int) -> Tensor:
    """One scene of Shapes at twice its rate, uint8 (31, 3, 64, 64)."""
    known = motion in shapes.MOTIONS
    scene = replace(shapes.make_scene(index, seed=7, motion=motion if known else "still"), motion=motion)
    with patch.object(shapes, "FRAMES", 2 * shapes.FRAMES):
        return to_bytes(shapes.render([scene])[0][:-1])


def texture_clip(move: str, seed: int, *, frames: int = 17, size: int = 96) -> Tensor:
    """A smooth random texture under a camera that pans, zooms or rolls, uint8 (frames, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    texture = torch.zeros(1, 3, 256, 256)
    for cells, share in ((4, 0.4), (16, 0.3), (64, 0.3)):
        noise = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        texture += share * F.interpolate(noise, (256, 256), mode="bicubic", align_corners=False)
    way = torch.linspace(0, 1, frames)
    zero = torch.zeros(frames)
    angle, zoom, pan = (0.6 * way if move == "roll" else zero, 1.5 ** (way if move == "zoom" else zero),
                        40 / 128 * way if move == "pan" else zero)  # fmt: skip
    cos, sin = angle.cos() / zoom * size / 256, angle.sin() / zoom * size / 256
    maps = torch.stack([torch.stack([cos, -sin, pan], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(maps, [frames, 3, size, size], align_corners=False)
    return to_bytes(F.grid_sample(texture.expand(frames, -1, -1, -1), grid, mode="bicubic", align_corners=False))


def to_bytes(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(made: Tensor, true: Tensor) -> float:
    error = (made.double() - true.double()).square().mean()
    return -10 * math.log10(max(float(error) / 255**2, 1e-10))


# ---- methods --------------------------------------------------------------------------------------------------


def ours(video: Tensor) -> Tensor:
    return interpolate(video, 2)[1::2]


def blend(video: Tensor) -> Tensor:
    return ((video[:-1].int() + video[1:].int() + 1) // 2).to(torch.uint8)


def hold(video: Tensor) -> Tensor:
    return video[:-1]


def minterpolate(video: Tensor, options: str) -> Tensor:
    """ffmpeg's filter, through PyAV's graph."""
    pixels = video.movedim(1, -1).numpy()
    pixels = np.concatenate([pixels[:1].repeat(AROUND, 0), pixels, pixels[-1:].repeat(AROUND, 0)])
    graph = av.filter.Graph()
    source = graph.add_buffer(width=pixels.shape[2], height=pixels.shape[1], format="yuv444p", time_base=Fraction(1, 8))
    steps = [source, graph.add("minterpolate", f"fps=16:scd=none:{options}"), graph.add("format", "rgb24")]
    steps.append(graph.add("buffersink"))
    for one, following in zip(steps[:-1], steps[1:], strict=True):
        one.link_to(following)
    graph.configure()
    found: dict[int, np.ndarray] = {}

    def take() -> None:
        while True:
            try:
                frame = steps[-1].pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            found[round(float(frame.pts * frame.time_base) * 16)] = frame.to_ndarray(format="rgb24")

    for number, picture in enumerate(pixels):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuv444p")
        frame.pts, frame.time_base = number, Fraction(1, 8)
        source.push(frame)
        take()
    source.push(None)
    take()
    made = [found[2 * AROUND + i] for i in range(1, 2 * len(video) - 1, 2)]
    return torch.from_numpy(np.stack(made)).movedim(-1, 1)


METHODS: dict[str, Method] = {
    "hold": hold,
    "blend": blend,
    "minterpolate": lambda video: minterpolate(video, "mi_mode=mci"),
    "its best": lambda video: minterpolate(
        video, "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:me=esa:mb_size=8:search_param=16"
    ),
    "ours": ours,
}


def score(clips: list[Tensor], method: Method) -> float:
    """Mean PSNR over clips of an odd number of frames."""
    return float(np.mean([psnr(method(clip[::2]), clip[1::2]) for clip in clips]))


def main(arguments: list[str]) -> None:
    scenes = int(arguments[0]) if arguments else 4
    motions = [motion for motion in shapes.MOTIONS if motion != "still"]
    clips = {motion: [scene_clip(motion, i) for i in range(scenes)] for motion in (*motions, "zoom_in", "orbit")}
    clips |= {f"texture: {move}": [texture_clip(move, seed) for seed in range(2)] for move in ("pan", "zoom", "roll")}
    for path in arguments[1:]:
        frames = read_video(path)[0].movedim(-1, 1)
        clips[path[-20:]] = [frames[: len(frames) - (len(frames) + 1) % 2]]
    rows, seconds = [], dict.fromkeys(METHODS, 0.0)
    print(f"{'PSNR in dB':20}" + "".join(f"{name:>14}" for name in METHODS))
    for name, known in clips.items():
        row = []
        for method in METHODS:
            began = time.perf_counter()
            row.append(score(known, METHODS[method]))
            seconds[method] += time.perf_counter() - began
        rows.append(row)
        print(f"{name:20}" + "".join(f"{value:14.2f}" for value in row), flush=True)
    print(f"{'mean':20}" + "".join(f"{value:14.2f}" for value in np.mean(rows, axis=0)))
    print(f"{'seconds':20}" + "".join(f"{value:14.1f}" for value in seconds.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
