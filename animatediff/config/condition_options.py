"""Options of networks beside the UNet: ControlNet, IP-Adapter, PIA, AnimateLCM-I2V, CameraCtrl, more motion modules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from animatediff.config.settings import Bool, Float, Int, Many, opt, options, read_by
from animatediff.config.values import (
    CAMERACTRL,
    CONTROLNET,
    IMAGE_ENCODER,
    IP_ADAPTER,
    OTHER,
    PICTURES,
    PLAIN_MOTION_MODULE,
    Images,
    Media,
    PathText,
    Pictures,
    varying,
)
from animatediff.utils import UserError, describe

Preprocessor = Literal[
    *("none", "canny", "blur", "tile", "scribble", "lineart", "outlines", "invert", "threshold", "inpaint")
]
LayerPreset = Literal["all", "style", "composition", "strong style", "style and composition"]
Move = Literal[
    *("zoom_in", "zoom_out", "pan_left", "pan_right"), *("tilt_up", "tilt_down", "roll_clockwise", "roll_anticlockwise")
]


def _layers(value: Any) -> Any:
    """A preset's name, or weights by the beginnings of layers' names."""
    presets = LayerPreset.__args__  # type: ignore[attr-defined]
    if isinstance(value, str):
        if value not in presets:
            raise UserError(f"got {value!r}, expected one of {', '.join(presets)}, or {{layer: weight}}")
        return value
    numbers = isinstance(value, dict) and all(type(weight) in (int, float) for weight in value.values())
    if not numbers or not value:
        raise UserError(f"got {describe(value)}, expected one of {', '.join(presets)}, or {{layer: weight}}")
    return {str(name): float(weight) for name, weight in value.items()}


@options
class ControlNet:
    """One ControlNet, a hint for each frame."""

    path: PathText
    images: Annotated[Pictures, PICTURES] = opt(
        (), "hints: a file, clip or folder; one picture for all frames, or {frame: picture}; by default the video"
    )
    preprocessor: Preprocessor = opt("none", "what makes hints of them; none: they are hints already")
    settings: dict[str, Float] = opt({}, "of the preprocessor, such as {low: 50, high: 150} of canny")
    scale: varying(0) = opt(1.0, "how much they count, by frame or step", "controlnet_conditioning_scale")
    start: Float = opt(0.0, "part of the steps from which on it acts", "control_guidance_start", ge=0, lt=1)
    end: Float = opt(1.0, "part of the steps up to which it acts", "control_guidance_end", gt=0, le=1)
    guess_mode: Bool = opt(False, "let the hints lead: nothing for the unconditional half, less for fine layers")


@options
class ControlNets:
    """Pictures that say what is where in each frame (ControlNet, arXiv 2302.05543); several add up."""

    nets: Annotated[Many[ControlNet], CONTROLNET] = opt((), "the ControlNets, each with its pictures", "controlnet")


@options
class IPAdapter:
    """One IP-Adapter and its pictures."""

    path: PathText
    images: Annotated[Pictures, PICTURES] = opt(
        (), "what the clip is to resemble: one or several pictures, or {frame: picture} to travel between"
    )
    scale: varying(0) = opt(1.0, "how much they count beside the text, by frame or step; 0.5 for both")
    layers: Annotated[Any, read_by(_layers)] = opt(
        "all", "which layers see them, or weights by the beginnings of their names, such as {mid_block: 0.5}"
    )
    masks: Annotated[Images, PICTURES] = opt((), "white where they act: one for all pictures, or one for each")
    start: Float = opt(0.0, "part of the steps from which on it acts", ge=0, lt=1)
    end: Float = opt(1.0, "part of the steps up to which it acts", gt=0, le=1)
    fit: Literal["crop", "squash", "pad"] = opt("crop", "how a picture becomes the square that the encoder sees")


@options
class IPAdapters:
    """Pictures beside the prompt (IP-Adapter, arXiv 2308.06721); several add up."""

    adapters: Annotated[Many[IPAdapter], IP_ADAPTER] = opt((), "the IP-Adapters, each with its pictures", "ip_adapter")
    image_encoder: Annotated[PathText, IMAGE_ENCODER] = opt(
        "", "CLIP vision model that the adapters were trained with: a folder or file", "image_encoder"
    )


@options
class PIA:
    """A picture that PIA's motion module animates (arXiv 2312.13964)."""

    image: Annotated[Media, PICTURES] = opt(None, "the picture")
    motion: Literal["small", "medium", "large"] = opt("medium", "how far the frames may go from it")
    frame: Int = opt(0, "which frame it is", ge=0)
    loop: Bool = opt(False, "come back to it in the last frame")
    style_transfer: Bool = opt(False, "for an image model of another style than the picture's")


@options
class I2V:
    """A picture that AnimateLCM-I2V's motion module animates (arXiv 2402.00769)."""

    image: Annotated[Media, PICTURES] = opt(None, "the picture")
    drift: Float = opt(0.8, "how far the frames may go from it; its authors use 0.8", ge=0, le=2)


@options
class Camera:
    """A camera that moves (CameraCtrl, arXiv 2404.02101): along a file of poses, or by named moves."""

    path: Annotated[PathText, CAMERACTRL] = opt("", "CameraCtrl camera encoder")
    poses: Annotated[PathText, OTHER] = opt("", "pose file in RealEstate10K's form, a line for each frame")
    move: Many[Move] = opt((), "one move, or several at once, in place of a file")
    speed: Float = opt(1.0, "of moves; 1: 60 degrees, or 1.5 units of way (3 of a zoom), in 16 frames", gt=0)
    scale: Float = opt(1.0, "how much it counts; 0: nothing", ge=0)


@options
class ExtraMotionModule:
    """A further motion module; effects of several are chained."""

    path: PathText
    scale: varying() = opt(1.0, "factor of its effect, by frame or step")
    start: Float = opt(0.0, "part of the steps from which on it acts", ge=0, lt=1)
    end: Float = opt(1.0, "part of the steps up to which it acts", gt=0, le=1)
    version: Literal["", "v1", "v2", "v3", "animatelcm"] = opt("", "its version, where its file cannot tell")


@options
class Mixture:
    """Further motion modules beside `motion_module`; with `motion_scale` they can take turns."""

    modules: Annotated[Many[ExtraMotionModule], PLAIN_MOTION_MODULE] = opt(
        (), "the modules, each with its scale and its part of the steps", "extra_motion_modules"
    )
