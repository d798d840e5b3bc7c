"""From a network and a text to the function that samplers call."""

from __future__ import annotations

from torch import Tensor

from animatediff.diffusion.guidance import Denoise, classifier_free_guidance
from animatediff.features.prompt_travel import Context, text_of_frames
from animatediff.features.sparsectrl import Control
from animatediff.features.windows import Windows, rotated, whole, windowed
from animatediff.models.unet import UNet
from animatediff.pipeline.steered import Steered


def make_denoiser(
    unet: UNet,
    context: Context,
    *,
    negative_context: Context | None = None,
    guidance_scale: float = 1.0,
    windows: tuple[Windows, Tensor] | None = None,
    steered: Steered | None = None,
    control: Control | None = None,
    first_frame: int = 0,
) -> Denoise:
    """The network's prediction for given prompts, guided where the scale is above 1.

    The latents stay in the caller's dtype (float32 in all pipelines); only the network sees its own.

    Args:
        unet: image or video model.
        context: text embedding of the prompts (b, l, d), or one that differs from frame to frame.
        negative_context: of the negative prompts, of the same kind; needed for guidance.
        guidance_scale: at 1 and below there is no unconditional pass, and the negative prompts do nothing.
        windows: the windows of frames that the network sees, and the sampler's timesteps; without, whole clips.
        steered: what `steer` made of the rest.
        control: what given frames add to the network; all parts of guidance get it.
        first_frame: the number of x's first frame in its clip, where x is a part of it (without `windows`).

    Returns:
        Denoise: x (b, f, c, h, w), t (b,) -> prediction of x's shape and dtype.
    """
    guided = guidance_scale > 1
    if guided and negative_context is None:
        raise ValueError("guidance needs negative_context")
    weight = unet.conv_in.weight
    perturbed = steered is not None and steered.said.pag_scale != 0
    parts = [negative_context] * guided + [context] * (1 + perturbed)
    text_of = text_of_frames([part for part in parts if part is not None], like=weight)

    def denoise(x: Tensor, t: Tensor, frames: Tensor) -> Tensor:
        if steered is not None:
            steered.aim(t, frames)
        text = text_of(frames)
        added = control(t, text, frames) if control else {}
        return unet(x.to(weight.dtype), t, text, **added).to(x.dtype)

    if steered is not None and steered.said.loop == "rotate":
        cut = rotated(denoise, steered.timesteps)
    else:
        cut = windowed(denoise, *windows) if windows else whole(denoise, first_frame)
    if steered is None:
        return classifier_free_guidance(cut, guidance_scale) if guided else cut
    return steered.guided(cut, guidance_scale, first_frame)
