"""What the options of finishing must not say together, nor with others; which speeds a clip's file can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from animatediff.config.clip_formats import check_fps
from animatediff.utils import UserError

if TYPE_CHECKING:
    from animatediff.config.request import Request


def finish_refusals(request: Request) -> Iterator[str]:
    """One message for every rule that a request breaks; options as {group.name}."""
    f, output = request.finish, request.output
    second = f.strength > 0
    if second and f.upscaler and f.scale is None:
        yield "{finish.strength} needs a {finish.scale} beside {finish.upscaler}, such as 2: set it"
    for name, default in (("enlarge", "pixels"), ("steps", None), ("tile", 0)):
        if getattr(f, name) != default and not second:
            yield (f"{{finish.{name}}} is of the second pass, which needs a {{finish.strength}} above 0, such as 0.4: "
                   f"set it, or remove {{finish.{name}}}")  # fmt: skip
    for name in _of_whole_pictures(request) if f.tile else ():
        yield (f"got {{finish.tile}} and {{{name}}}, which is of whole pictures, expected one of them: set "
               "{finish.tile} to 0")  # fmt: skip
    of_pixels = {"finish.upscaler": bool(f.upscaler), "inputs.mask": request.inputs.mask is not None}
    for name in (name for name, given in of_pixels.items() if given and second and f.enlarge == "latents"):
        yield (f"got {{finish.enlarge}}=latents and {{{name}}}, which is of pixels, expected one of them: remove "
               "{finish.enlarge}")  # fmt: skip
    if second and request.motion.mask:
        yield "got {motion.mask}, which has the first pass's size, and a second pass: set {finish.strength} to 0"
    for name, default in (("interpolator", ""), ("loop", None)):
        if getattr(f, name) != default and f.interpolate == 1:
            yield f"{{finish.{name}}} needs a {{finish.interpolate}} of 2, 4 or 8: set it, or remove {{finish.{name}}}"
    if f.interpolate > 1 and request.size.num_frames == 1:
        yield "{finish.interpolate}: got a clip of one frame, expected at least two: raise {size.num_frames}"
    if f.audio and output.format != "mp4":
        yield f"{{finish.audio}}: got {output.format}, which holds no sound, expected mp4: set {{output.format}}=mp4"
    try:
        check_fps(request.written_fps, output.format)
    except UserError as error:
        option = "{output.fps} times {finish.interpolate}" if f.interpolate > 1 else "{output.fps}"
        yield str(error).replace("fps:", f"{option}:", 1)


def _of_whole_pictures(request: Request) -> Iterator[str]:
    """Options that hand the network something of the whole picture's size."""
    given = {
        "controlnets.nets": request.controlnets.nets,
        "sparsectrl.path": request.sparsectrl.path,
        "pia.image": request.pia.image is not None,
        "i2v.image": request.i2v.image is not None,
        "camera.path": request.camera.path,
        "ip_adapters.adapters": any(len(a.masks) for a in request.ip_adapters.adapters),
    }
    yield from (name for name, value in given.items() if value)
