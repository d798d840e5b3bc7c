"""SparseCtrl (arXiv 2311.16933): pictures of some frames of a clip, and what its encoder makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from animatediff.checkpoints.known_files import find_file, missing_file
from animatediff.checkpoints.load import ImageModel
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl
from animatediff.config.refusals import condition_frames
from animatediff.config.request import Request
from animatediff.config.request import SparseCtrl as Options
from animatediff.features.feature import FrameDenoise, Run
from animatediff.features.inputs import as_picture
from animatediff.media.pictures import fit_pictures
from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.models.unet import UNet
from animatediff.utils import UserError, naming

CACHE_BYTES = 2**28  # of residuals: enough for small models; one guided window of SD 1.5 takes more, see `Control`


@contextmanager
def sparsectrl(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`sparsectrl`: pictures of some frames, as residuals of the network's skip connections."""
    if not len(run.request.sparsectrl.images):
        yield denoise
        return
    control = run.once("sparsectrl", lambda: make_control(run))

    def controlled(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        return denoise(x, t, frames, **inputs, **control(t, run.text(frames), frames))

    yield controlled


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> tuple[SparseCtrl, str] | None:
    """The encoder of `sparsectrl.path`, and a line about it; None without one.

    Args:
        headers: `pipeline.headers.Headers`.

    Raises:
        UserError: it does not fit the image model, or contradicts its official config.
    """
    if "sparsectrl.path" not in headers.paths:
        return None
    assert image.vae is not None
    encoder, report = load_sparsectrl(
        headers.paths["sparsectrl.path"], image.unet, image.vae, norm_over_frames=request.model.norm_over_frames
    )
    config, motion = encoder.config, encoder.config.unet.motion
    assert motion is not None
    if headers.control is not None:
        with naming(headers.paths["sparsectrl.config"]):
            headers.control.check(config)
    longest = max(motion.max_frames, request.model.max_frames)
    encoder.config = replace(config, unet=config.unet.with_motion(replace(motion, max_frames=longest)))
    return encoder, str(report)


def make_control(run: Run) -> Control:
    """The control of a clip, from its pictures.

    Raises:
        UserError: a picture cannot be read, or tensors are not of the clip's size.
    """
    options, size, model = run.request.sparsectrl, run.request.size, run.model
    encoder, shape = model.networks["sparsectrl"], (size.height, size.width)
    pixels = condition_pixels(options, shape).to(model.device)
    if encoder.config.kind == "rgb":
        pixels = model.vae.encode_video(pixels[None] * 2 - 1)[0]
    given = condition_frames(options.frames, images=len(pixels), frames=size.num_frames)
    return Control(encoder, pixels.to(model.dtype), given, frames=size.num_frames, scales=options.scale)


class Control:
    """What the network is told about a clip's given frames, window by window.

    It depends on the timestep, the text and the window alone, so that it is computed once for each of them: clips of
    one prompt share it, the last one is remembered, and others for when a timestep comes again, while they fit into
    `CACHE_BYTES` (16 guided frames of SD 1.5 at 512x512 take 430 MB in half precision).

    Args:
        encoder: on its device, in its dtype.
        condition: what it takes for each given frame, (n, c, H, W), see `SparseCtrl.embed`.
        given: numbers of these frames in the clip, from 0.
        frames: of the clip.
        scales: of the residuals, one for all frames or one for each.
    """

    def __init__(
        self, encoder: SparseCtrl, condition: Tensor, given: Sequence[int], *, frames: int, scales: Sequence[float]
    ):
        self.encoder = encoder
        rows = torch.cat([condition, torch.zeros_like(condition[:1])])  # the last one: nothing given
        self.embedded = encoder.embed(rows, torch.arange(len(rows)) < len(condition))
        self.row = torch.full((frames,), len(condition))
        self.row[list(given)] = torch.arange(len(condition))
        self.scales = None if set(scales) == {1.0} else torch.tensor(scales, dtype=torch.float32).expand(frames)
        self._cache: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        self._last: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        self._budget = CACHE_BYTES

    def __call__(self, t: Tensor, text: Tensor, frames: Tensor) -> dict[str, Any]:
        """Keyword arguments of `UNet.forward`.

        Args:
            t: timesteps (b,), all the same.
            text: the network's text embedding, (b, …).
            frames: numbers (w,) of the window's frames in the clip.
        """
        firsts, which = _distinct(text)
        residuals = self._cached(t, text[firsts], frames)
        if len(firsts) < len(text):
            residuals = [
                rearrange(rearrange(r, "(b f) ... -> b f ...", f=len(frames))[which], "b f ... -> (b f) ...")
                for r in residuals
            ]
        return {"down_residuals": residuals[:-1], "mid_residual": residuals[-1]}

    def _cached(self, t: Tensor, text: Tensor, frames: Tensor) -> list[Tensor]:
        key = (float(t[0]), tuple(frames.tolist()))
        known = self._cache.get(key) or self._last.get(key)
        if known and torch.equal(known[0], text):
            return known[1]
        residuals = self._compute(t[: len(text)], text, frames)
        self._last = {key: (text, residuals)}
        size = sum(r.nbytes for r in residuals) if key not in self._cache else 0
        if size <= self._budget:
            self._cache |= self._last
            self._budget -= size
        return residuals

    def _compute(self, t: Tensor, text: Tensor, frames: Tensor) -> list[Tensor]:
        window = self.embedded[self.row[frames].to(self.embedded.device)]
        down, mid = self.encoder(window.expand(len(text), *window.shape), t, text)
        if self.scales is None:
            return [*down, mid]
        scale = self.scales[frames].repeat(len(text))[:, None, None, None].to(mid)
        return [residual * scale for residual in (*down, mid)]


def condition_pixels(options: Options, size: tuple[int, int]) -> Tensor:
    """The pictures of `sparsectrl.images`, float32 (n, 3, *size) in [0, 1].

    Files and PIL images are cut to the shape of the clip around their centre and resized (bilinear); tensors
    (n, 3, H, W) have to be of its size.

    Raises:
        UserError: a file that is no picture, or a tensor of another shape.
    """
    images = options.images
    if isinstance(images, Tensor):
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        if pixels.shape[1:] != (3, *size):
            expected = (len(images), 3, *size)
            raise UserError(f"conditioning_frames: got a tensor of shape {tuple(pixels.shape)}, expected {expected}")
        return pixels
    fitted = []
    for i, image in enumerate(images):
        with naming(f"controlnet_images[{i}]"):
            fitted.append(fit_pictures([_as_picture(image)], *size)[0] / 255)
    pixels = torch.stack(fitted)
    return stretch_gray(pixels) if options.normalize else pixels


def _as_picture(image: Any) -> Any:
    if isinstance(image, (str, Path)):
        path = find_file(str(image))
        if path is None:
            raise UserError(missing_file(str(image)))
        return path
    if isinstance(image, Tensor) and image.ndim == 3:
        image = rearrange(image, "c h w -> h w c").cpu().numpy()
    return as_picture(image)


def stretch_gray(pixels: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) made gray, each stretched from black to white: scribbles on other grounds."""
    gray = pixels.mean(dim=1, keepdim=True).expand_as(pixels)
    gray = gray - gray.amin((1, 2, 3), keepdim=True)
    return gray / gray.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)


def _distinct(rows: Tensor) -> tuple[list[int], list[int]]:
    """The first of all rows (along axis 0) that are equal, and for each row which of these it is."""
    firsts: list[int] = []
    which = []
    for i, row in enumerate(rows):
        same = next((k for k, first in enumerate(firsts) if torch.equal(rows[first], row)), None)
        if same is None:
            same = len(firsts)
            firsts.append(i)
        which.append(same)
    return firsts, which
