"""What the options of `condition_options` must not say together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from animatediff.config.keyframes import Keyframes
from animatediff.utils import UserError

if TYPE_CHECKING:
    from animatediff.config.request import Request

CAMERA_SIDE = 64  # pixels: the camera encoder halves 6 times and rounds down, where the UNet rounds up
CAMERA_FRAMES = 16  # the longest clip CameraCtrl was trained on


def condition_refusals(request: Request, *, motion: bool, complete: bool = True) -> Iterator[str]:
    """One message for every rule that a request breaks; options as {group.name}. The others as of `refusals`."""
    yield from _controlnets(request, complete)
    yield from _ip_adapters(request, complete)
    yield from _camera(request, motion, complete)
    for i, module in enumerate(request.mixture.modules):
        name = "{mixture.modules}" + (f"[{i}]" if len(request.mixture.modules) > 1 else "")
        if not motion:
            yield f"{name} needs a motion_module beside it: set {{model.motion_module}}"
        yield from _scale_and_steps(name, module, request.size.num_frames)
    for group in ("pia", "i2v"):
        if getattr(request, group).image is not None and not motion:
            yield f"{{{group}.image}} needs a motion_module of its kind: set {{model.motion_module}}"
    if request.pia.frame >= request.size.num_frames:
        yield f"{{pia.frame}}: got {request.pia.frame}, expected 0 to {request.size.num_frames - 1}"
    if request.pia.loop and request.pia.style_transfer:
        yield "got both {pia.loop} and {pia.style_transfer}, expected one of them"


def _controlnets(request: Request, complete: bool) -> Iterator[str]:
    many = len(request.controlnets.nets) > 1
    for i, net in enumerate(request.controlnets.nets):
        name = "{controlnets.nets}" + (f"[{i}]" if many else "")
        if complete and not len(net.images) and request.inputs.video is None:
            yield f"{name}: got no images, expected hints, or a {{inputs.video}} to make them of: add images"
        if complete and net.preprocessor == "inpaint" and request.inputs.mask is None:
            yield f"{name}: got preprocessor inpaint without a mask, expected one: add {{inputs.mask}}"
        yield from _common(name, net, request.size.num_frames)


def _ip_adapters(request: Request, complete: bool) -> Iterator[str]:
    o = request.ip_adapters
    for i, adapter in enumerate(o.adapters):
        name = "{ip_adapters.adapters}" + (f"[{i}]" if len(o.adapters) > 1 else "")
        if complete and not len(adapter.images):
            yield f"{name}: got no images, expected at least one picture: add images"
        masks, pictures = len(adapter.masks), len(adapter.images)
        if masks not in (0, 1, pictures) and (complete or pictures) or (masks > 1 and isinstance(adapter.images, dict)):
            yield f"{name}: got {masks} masks for {pictures} images, expected one, or one for each"
        yield from _common(name, adapter, request.size.num_frames)
    if o.adapters and not o.image_encoder:
        yield "{ip_adapters.adapters} needs the image encoder it was trained with: set {ip_adapters.image_encoder}"
    if o.image_encoder and not o.adapters:
        yield "{ip_adapters.image_encoder} needs an adapter: set {ip_adapters.adapters}, or remove it"


def _common(name: str, entry: Any, frames: int) -> Iterator[str]:
    """Rules of a ControlNet and of an IP-Adapter alike."""
    if isinstance(entry.images, dict) and (last := max(entry.images)) >= frames:
        yield f"{name}: got a picture at frame {last}, expected 0 to {frames - 1}, the frames of the clip"
    yield from _scale_and_steps(name, entry, frames)


def _scale_and_steps(name: str, entry: Any, frames: int) -> Iterator[str]:
    if entry.start >= entry.end:
        yield f"{name}: got start {entry.start:g} and end {entry.end:g}, expected the start before the end"
    try:
        Keyframes.read(entry.scale).check(frames)
    except UserError as error:
        yield f"{name}: scale: {error}"


def _camera(request: Request, motion: bool, complete: bool) -> Iterator[str]:
    c = request.camera
    if not c.path:
        for name in ("poses", "move"):
            if getattr(c, name):
                yield f"{{camera.{name}}} needs a CameraCtrl file: set {{camera.path}}, or remove {{camera.{name}}}"
        return
    if not motion:
        yield "{camera.path} needs the motion_module it was trained with, v3's: set {model.motion_module}"
    if bool(c.poses) == bool(c.move) and (complete or c.poses):
        got = "both" if c.poses else "neither"
        yield f"got {got} of {{camera.poses}} and {{camera.move}}, expected one of them"
    for name in ("height", "width"):
        if (side := getattr(request.size, name)) and side % CAMERA_SIDE:  # what is open yet is known after resolve
            yield f"{{size.{name}}}: got {side} pixels, expected a multiple of {CAMERA_SIDE} with {{camera.path}}"
    length = (request.windows.length or CAMERA_FRAMES) if request.windows else request.size.num_frames
    if length and length > CAMERA_FRAMES:
        yield (
            f"{{size.num_frames}}: got {length} frames at a time, expected at most {CAMERA_FRAMES}, the longest clip "
            f"CameraCtrl was trained on: set windows=open and window_length={CAMERA_FRAMES}"
        )
