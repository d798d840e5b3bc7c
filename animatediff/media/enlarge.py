"""Clips made larger: by Lanczos, or by an upscaler model that spandrel knows (ESRGAN and its family); colours kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from animatediff.utils import UserError

INSTALL = 'pip install "animatediff[finish]" (or pip install spandrel torchvision)'

Upscale = Callable[[Tensor], Tensor]  # frames uint8 (f, 3, H, W) -> larger ones, by the model's own factor


def enlarge(video: Tensor, height: int, width: int, *, upscale: Upscale | None = None) -> Tensor:
    """A clip of another size, uint8 (f, 3, height, width), of uint8 (f, 3, H, W).

    A model's result is brought to the size by Lanczos, too; what has the size already is as it was.
    """
    video = video if upscale is None else upscale(video)
    if video.shape[-2:] == (height, width):
        return video
    frames = [Image.fromarray(frame.movedim(0, -1).numpy()) for frame in video]
    resized = [np.asarray(frame.resize((width, height), Image.Resampling.LANCZOS)) for frame in frames]
    return torch.from_numpy(np.stack(resized)).movedim(-1, 1).contiguous()


def match_colors(video: Tensor, reference: Tensor) -> Tensor:
    """A clip with another clip's mean and standard deviation of each channel, over all of its frames and pixels.

    One map for the whole clip, so that nothing can flicker by it (Reinhard et al. 2001, "Color transfer between
    images", in RGB).

    Args:
        video, reference: uint8 (f, 3, H, W), of any sizes.
    """
    dims = (0, 2, 3)
    pixels, like = video.float(), reference.float()
    mean, std = pixels.mean(dims, keepdim=True), pixels.std(dims, keepdim=True)
    gain = torch.where(std > 0, like.std(dims, keepdim=True) / std.clamp(min=1e-6), 1.0)
    return ((pixels - mean) * gain + like.mean(dims, keepdim=True)).round().clamp(0, 255).to(torch.uint8)


def load_upscaler(path: Path, device: torch.device | str = "cpu") -> tuple[Upscale, int]:
    """An upscaler model and its factor, from a .pth or .safetensors file of any architecture that spandrel knows.

    Spandrel reads pickles without running anything in them.

    Raises:
        UserError: spandrel, or torchvision, which it imports, is not there; a file that it cannot read; a model that
            makes no larger pictures.
    """
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except (ImportError, RuntimeError) as error:  # torchvision of another torch fails with the latter
        missing = "which is not installed" if getattr(error, "name", None) == "spandrel" else f"which fails ({error})"
        raise UserError(f"an upscaler model needs spandrel, {missing}: {INSTALL}") from None
    try:
        model = ModelLoader(device=torch.device(device)).load_from_file(path)
    except Exception as error:  # whatever a stranger's file makes of the architectures that are tried on it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"got {path}, expected an upscaler that spandrel knows (ESRGAN …): {reason}") from None
    channels = (getattr(model, "input_channels", 0), getattr(model, "output_channels", 0))
    if not isinstance(model, ImageModelDescriptor) or channels != (3, 3):
        raise UserError(f"got {path}, a {model.architecture.name} model, expected one from RGB pictures to larger ones")
    model.eval()

    @torch.no_grad()
    def upscale(video: Tensor) -> Tensor:
        made = [model(frame[None].to(device).float() / 255)[0].mul(255).round().clamp(0, 255) for frame in video]
        return torch.stack([frame.to(torch.uint8).cpu() for frame in made])

    return upscale, model.scale
