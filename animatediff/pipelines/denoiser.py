"""From a network and a text to the function that samplers call."""

from __future__ import annotations

import torch
from torch import Tensor

from animatediff.diffusion.guidance import Denoise, classifier_free_guidance
from animatediff.diffusion.windows import Windows, whole, windowed
from animatediff.models.unet import UNet


def make_denoiser(
    unet: UNet,
    context: Tensor,
    *,
    negative_context: Tensor | None = None,
    guidance_scale: float = 1.0,
    windows: tuple[Windows, Tensor] | None = None,
    first_frame: int = 0,
) -> Denoise:
    """The network's prediction for given prompts, guided where the scale is above 1.

    The latents stay in the caller's dtype (float32 in all pipelines); only the network sees its own.

    Args:
        unet: image or video model.
        context: text embedding of the prompts (b, l, d).
        negative_context: of the negative prompts (b, l, d); needed for guidance.
        guidance_scale: at 1 and below there is no unconditional pass, and the negative prompts do nothing.
        windows: the windows of frames that the network sees, and the sampler's timesteps; without, whole clips.
        first_frame: the number of x's first frame in its clip, where x is a part of it (without `windows`).

    Returns:
        Denoise: x (b, f, c, h, w), t (b,) -> prediction of x's shape and dtype.
    """
    guided = guidance_scale > 1
    if guided and negative_context is None:
        raise ValueError("guidance needs negative_context")
    weight = unet.conv_in.weight
    text = (torch.cat([negative_context, context]) if guided else context).to(weight.device, weight.dtype)

    def denoise(x: Tensor, t: Tensor, frames: Tensor) -> Tensor:
        return unet(x.to(weight.dtype), t, text).to(x.dtype)

    cut = windowed(denoise, *windows) if windows else whole(denoise, first_frame)
    return classifier_free_guidance(cut, guidance_scale) if guided else cut
