"""Images of some frames of a clip, and what a SparseCtrl encoder (arXiv 2311.16933) adds to the network for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from animatediff.config.sparsectrl_yaml import check_scales, condition_frames
from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.pipeline.model import Components
from animatediff.utils import UserError, naming

ConditionImage = str | Path | Image.Image
ConditionImages = ConditionImage | Sequence[ConditionImage] | Tensor
KEPT_BYTES = 2**28  # of residuals: enough for small models; one guided window of SD 1.5 takes more, see `Control`


class Control:
    """What the network is told about a clip's given frames, window by window.

    It depends on the timestep, the text and the window alone, so that it is computed once for each of them: clips of
    one prompt share it, the last one is remembered, and others for when a timestep comes again, while they fit into
    `KEPT_BYTES` (16 guided frames of SD 1.5 at 512x512 take 430 MB in half precision).

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
        self._kept: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        self._last: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        self._room = KEPT_BYTES

    def __call__(self, t: Tensor, text: Tensor, frames: Tensor) -> dict[str, Any]:
        """Keyword arguments of `UNet.forward`.

        Args:
            t: timesteps (b,), all the same.
            text: the network's text embedding, (b, …).
            frames: numbers (w,) of the window's frames in the clip.
        """
        firsts, which = _distinct(text)
        residuals = self._remembered(t, text[firsts], frames)
        if len(firsts) < len(text):
            residuals = [
                rearrange(rearrange(r, "(b f) ... -> b f ...", f=len(frames))[which], "b f ... -> (b f) ...")
                for r in residuals
            ]
        return {"down_residuals": residuals[:-1], "mid_residual": residuals[-1]}

    def _remembered(self, t: Tensor, text: Tensor, frames: Tensor) -> list[Tensor]:
        key = (float(t[0]), tuple(frames.tolist()))
        known = self._kept.get(key) or self._last.get(key)
        if known and torch.equal(known[0], text):
            return known[1]
        residuals = self._compute(t[: len(text)], text, frames)
        self._last = {key: (text, residuals)}
        size = sum(r.nbytes for r in residuals) if key not in self._kept else 0
        if size <= self._room:
            self._kept |= self._last
            self._room -= size
        return residuals

    def _compute(self, t: Tensor, text: Tensor, frames: Tensor) -> list[Tensor]:
        window = self.embedded[self.row[frames].to(self.embedded.device)]
        down, mid = self.encoder(window.expand(len(text), *window.shape), t, text)
        if self.scales is None:
            return [*down, mid]
        scale = self.scales[frames].repeat(len(text))[:, None, None, None].to(mid)
        return [residual * scale for residual in (*down, mid)]


def make_control(
    c: Components,
    images: ConditionImages | None,
    indices: Sequence[int],
    scale: float | Sequence[float],
    *,
    frames: int,
    window: int,
    size: tuple[int, int],
) -> Control | None:
    """The control of a call, None where no images are given.

    Args:
        images: one or n files, PIL images, or a tensor (n, 3, H, W) in [0, 1] of the clip's size.
        indices: the frame of each image; negative ones count from the end.
        scale: one for all frames, or one for each.
        frames: of the clip.
        window: frames that the network sees at a time.
        size: (height, width) of the clip in pixels.

    Raises:
        UserError: no encoder is loaded, or it was not trained on so long windows; images, indices and scales do not fit
            the clip; an image cannot be read.
    """
    if images is None:
        return None
    if isinstance(images, ConditionImage):
        images = [images]
    encoder = c.sparsectrl
    if encoder is None:
        raise UserError(
            "got conditioning_frames without a SparseCtrl encoder, expected one: set controlnet_path in the config"
        )
    motion = encoder.config.unet.motion
    if motion and window > motion.max_frames:
        raise UserError(
            f"got {window} frames at a time, expected at most {motion.max_frames}, the longest clip the SparseCtrl "
            "encoder was trained on: animate in shorter windows, or set max_frames in the config"
        )
    scales = (scale,) if isinstance(scale, (int, float)) else tuple(scale)
    with naming("controlnet_frame_indices"):
        given = condition_frames(indices, images=len(images), frames=frames)
    with naming("controlnet_conditioning_scale"):
        check_scales(scales, frames=frames)
    pixels = images if isinstance(images, Tensor) else read_condition_images(images, size)
    if tuple(pixels.shape) != (len(images), 3, *size):
        expected = (len(images), 3, *size)
        raise UserError(f"conditioning_frames: got a tensor of shape {tuple(pixels.shape)}, expected {expected}")
    condition = pixels.to(c.device)
    if encoder.config.kind == "rgb":
        condition = c.vae.encode_video(condition[None] * 2 - 1)[0]
    return Control(encoder, condition.to(c.dtype), given, frames=frames, scales=scales)


def read_condition_images(
    images: Sequence[ConditionImage], size: tuple[int, int], *, normalize: bool = False
) -> Tensor:
    """Images cut to the shape of the clip around their centre and resized (bilinear), float32 (n, 3, *size) in [0, 1].

    Args:
        size: (height, width).
        normalize: make them grey, and stretch each from black to white; for scribbles on other grounds.

    Raises:
        UserError: a file that is no image.
    """
    return torch.stack([_fitted(_opened(image), size, normalize) for image in images])


def _opened(image: ConditionImage) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as file:
            return ImageOps.exif_transpose(file).convert("RGB")  # as viewers turn it
    except FileNotFoundError:
        raise UserError(f"got {image}, expected an image: there is no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"got {image}, expected an image: it cannot be read ({reason})") from None


def _fitted(image: Image.Image, size: tuple[int, int], normalize: bool) -> Tensor:
    height, width = size
    scale = min(image.width / width, image.height / height)
    w, h = max(round(scale * width), 1), max(round(scale * height), 1)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    image = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    if normalize:
        pixels = pixels.mean(dim=0, keepdim=True).expand_as(pixels)
        pixels = pixels - pixels.min()
        pixels = pixels / pixels.max().clamp(min=1e-6)
    return pixels


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
