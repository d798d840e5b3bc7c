"""What follows sampling: a clip larger (a second pass, an upscaler, Lanczos), then smoother, its colours kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.checkpoints.interpolator_files import load_interpolator
from animatediff.checkpoints.known_files import find_file, missing_file
from animatediff.config.finish_options import Finish
from animatediff.config.request import Inputs, Request, Windows
from animatediff.features.feature import Feature
from animatediff.features.inputs import steps_taken
from animatediff.features.spatial_tiles import spatial_tiles
from animatediff.media.enlarge import enlarge, load_upscaler, match_colors
from animatediff.media.interpolate import interpolate
from animatediff.media.seek import probe
from animatediff.media.sound import Sound
from animatediff.metrics.video_metrics import flicker, loop_seam
from animatediff.models.vae import VAE
from animatediff.utils import UserError, naming


class Resample(Protocol):
    def __call__(self, request: Request, features: tuple[Feature, ...], small: Tensor | None, /) -> Tensor:
        """Clips, uint8 (b, f, 3, H, W), of a request whose `inputs.video` are clips to start from.

        Args:
            small: uint8 (b, f, 3, H', W'), whose enlarged latents are started from instead.
        """
        ...


class Finisher:
    """What a request's `finish` makes of clips; the models that it names are loaded once.

    Raises:
        UserError: a model that is not there, or is another kind of file.
    """

    def __init__(self, options: Finish, *, device: torch.device | str = "cpu", downsampling: int = 8):
        self.options, self.downsampling, own = options, downsampling, 1
        self.upscale = self.between = None
        if options.upscaler:
            path = file_of(options.upscaler, "finish.upscaler")
            with naming("finish.upscaler"):
                self.upscale, own = load_upscaler(path, device)
        self.scale = options.scale or float(own)
        on_mps = torch.device(device).type == "mps"  # whose grid_sample does not have every mode of the motion's
        self.device = torch.device("cpu" if on_mps else device)
        if options.interpolator:
            self.between = load_interpolator(file_of(options.interpolator, "finish.interpolator"), self.device)

    @torch.no_grad()
    def __call__(self, video: Tensor, request: Request, resample: Resample | None = None) -> Tensor:
        """Finished clips, uint8 (b, f', 3, H', W').

        Args:
            video: uint8 (b, f, 3, H, W).
            request: what made them, nothing left open.
            resample: what the second pass is sampled by.
        """
        f = self.options
        if f.enlarges:
            if f.strength:
                size = second_size(video.shape[-2:], self.scale, self.downsampling)
            else:  # players want even sides of an MP4
                size = enlarged_size(video.shape[-2:], self.scale, 2 if request.output.format == "mp4" else 1)
            larger = torch.stack([enlarge(clip, *size, upscale=self.upscale) for clip in video])
            if f.strength:
                assert resample is not None
                tiles = (spatial_tiles(max(f.tile // self.downsampling, 1)),) if f.tile else ()
                second = second_pass(request, larger)
                small = video[:, : second.size.num_frames] if f.enlarge == "latents" else None
                larger = resample(second, tiles, small)
            if f.match_colors and (f.strength or f.upscaler):
                larger = torch.stack([match_colors(a, b) for a, b in zip(larger, video, strict=True)])
            video = larger
        if f.interpolate == 1:
            return video
        loop = (request.loops or request.loop.mode == "pingpong") if f.loop is None else f.loop
        made = (interpolate(c, f.interpolate, loop=loop, between=self.between, device=self.device) for c in video)
        return torch.stack(list(made))


def enlarged_size(size: tuple[int, int] | torch.Size, scale: float, multiple: int) -> tuple[int, int]:
    """Height and width, `scale` times as large, to the nearest multiple."""
    height, width = (max(round(side * scale / multiple), 1) * multiple for side in size)
    return height, width


def second_size(size: tuple[int, int] | torch.Size, scale: float, downsampling: int = 8) -> tuple[int, int]:
    """Height and width of the second pass: multiples of 8, as those of any request, and of a latent pixel's side."""
    return enlarged_size(size, scale, math.lcm(8, downsampling))


def enlarged_latents(vae: VAE, video: Tensor, size: tuple[int, int]) -> Tensor:
    """Scaled latents (b, f, c, *size) of smaller clips, uint8 (b, f, 3, H, W), enlarged as latents."""
    latents = vae.encode_video(video.float() / 127.5 - 1).float()
    flat = F.interpolate(latents.flatten(0, 1), size=size, mode="bicubic")
    return flat.unflatten(0, latents.shape[:2])


def second_pass(request: Request, video: Tensor | None = None) -> Request:
    """Video to video over clips that were made larger: same networks, prompts, seeds and everything else.

    The clips take the place of what the first pass started from; of this only a mask stays (and which of its frames
    are read), whose black parts are theirs. Windows stay; a clip that was extended piece by piece is seen through open
    ones.

    Args:
        request: of the first pass, nothing left open.
        video: uint8 (b, f, 3, H, W), of the new size; None to look at the request before there are any.
    """
    f, s, steps = request.finish, request.size, request.finish.steps or request.sampling.steps
    if steps and not steps_taken(steps, f.strength):
        raise UserError(f"finish.strength: got {f.strength:g} of {steps} steps, which is none: raise one of them")
    height, width = second_size((s.height, s.width), f.scale or 1)  # type: ignore[arg-type]
    if video is not None:
        height, width = video.shape[-2:]
        frames = 2 * s.num_frames - 2 if request.loop.mode == "pingpong" and s.num_frames > 1 else s.num_frames
        if video.shape[1] != frames:
            raise UserError(f"got a clip of {video.shape[1]} frames, expected the {frames} that its settings speak of")
        video = video[:, : s.num_frames]  # the way back is the way there
    kept = {name: getattr(request.inputs, name) for name in ("mask", "video_start", "video_stride", "video_fps")}
    start = replace(Inputs(), video=video, strength=f.strength, **kept)
    return replace(
        request,
        size=replace(s, height=height, width=width),
        sampling=request.sampling if f.steps is None else replace(request.sampling, steps=f.steps, timesteps=()),
        windows=Windows() if request.inputs.extend and request.windows is None else request.windows,
        inputs=start,
        freeinit=None,  # it looks for a start
        finish=Finish(),
    )


def sound_of(request: Request) -> Sound | None:
    """The sound that goes along with a clip; of the video that it started from, from the same frame on."""
    if not request.finish.audio:
        return None
    path, i = file_of(request.finish.audio, "finish.audio"), request.inputs
    same = isinstance(i.video, str) and find_file(i.video) == path
    return Sound(path, i.video_start / probe(path).fps if same and i.video_start else 0.0)


def compare(before: Tensor, after: Tensor) -> str:
    """What became of a clip, uint8 (f, 3, H, W), in one line: its size, and seam, flicker and colours (evaluation.md).

    The seam and the flicker are `loop_seam` and `flicker` of the metrics; colours are the means of all pixels.
    """

    def row(name: str, measure: Any) -> str:
        a, b = (measure(clip) for clip in (before, after))
        return f"{name} {'–' if a is None else f'{a:.4f}'} -> {'–' if b is None else f'{b:.4f}'}"

    sizes = [f"{len(clip)} frames of {clip.shape[-1]}x{clip.shape[-2]}" for clip in (before, after)]
    means = [clip.float().mean(dim=(0, 2, 3)) for clip in (before, after)]
    shift = f"colours {float((means[1] - means[0]).abs().max()):.1f} of 255 apart"
    return "; ".join((" -> ".join(sizes), row("seam", loop_seam), row("flicker", flicker), shift))


def file_of(path: str, option: str) -> Path:
    with naming(option):
        if (found := find_file(path)) is None:
            raise UserError(missing_file(path))
    return found
