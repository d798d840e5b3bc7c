"""Pictures and video that a clip starts from, at the clip's size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from animatediff.checkpoints.files import file_sha256
from animatediff.checkpoints.known_files import find_file, missing_file
from animatediff.config.refusals import STRENGTHS
from animatediff.config.request import Inputs, Request
from animatediff.media.pictures import BLACK, WHITE, fit_frames
from animatediff.media.video import VIDEO_SUFFIXES, list_pictures, read_video
from animatediff.utils import UserError, naming

PICTURES = ("video", "image", "last_image", "mask")
Pictures = Tensor | np.ndarray | Sequence[Any] | Image.Image | None


@dataclass(frozen=True)
class PixelInputs:
    """Pictures and clips at a clip's size, in [-1, 1], and how they are used (see `config.request.Inputs`)."""

    video: Tensor | None  # (b, f, 3, H, W), b being 1 or one for each clip, f 1 (it stands still) or as many
    image: Tensor | None  # (b, 1, 3, H, W)
    last_image: Tensor | None
    mask: Tensor | None  # bool (b, f, 1, H, W), True where the clip is painted anew
    strength: float
    inversion: bool
    extend: int
    image_ramp: float


def other_speed(request: Request) -> str | None:
    """A line where the frames of the video file that a clip starts from are not as many a second as the clip's."""
    i, fps = request.inputs, request.output.fps
    path = find_file(i.video) if isinstance(i.video, str) else None
    if path is None or path.suffix.lower() not in (*VIDEO_SUFFIXES, ".gif"):
        return None
    frames, own = read_video(path, most=request.size.num_frames, **_speed(i))
    if len(frames) == 1 or 0.95 < own / fps < 1.05:
        return None
    kept = fps * i.video_stride
    return f"video: {own:.4g} of its frames are a second, {fps:g} of the clip's: video_fps={kept:g} keeps its speed"


def steps_taken(steps: int, strength: float) -> int:
    """How many of a sampler's steps are taken, the last ones; counted as diffusers counts them."""
    return min(int(steps * strength), steps)


def default_strength(inputs: Inputs) -> float | None:
    """The strength of what is given first; None where nothing is."""
    if inputs.strength is not None:
        return inputs.strength
    given = {**vars(inputs), "extend": inputs.extend or None}
    return next((value for name, value in STRENGTHS.items() if given[name] is not None), None)


def prepare_inputs(
    inputs: Inputs, *, frames: int, height: int, width: int, window: int, clips: int = 1
) -> PixelInputs | None:
    """What a clip starts from at the clip's size; None where nothing is given.

    Args:
        inputs: files, PIL images (lists, or lists of lists for several clips), arrays or tensors, see `as_clips`.
        frames, height, width, clips: what is asked for.
        window: frames of an extension's window (`extend.chain_window`).

    Raises:
        UserError: something is missing, out of its range, of another size, or does not go with another.
    """
    given = {name: getattr(inputs, name) for name in PICTURES}
    if all(value is None for value in given.values()):
        return None
    if not 0 <= inputs.extend < window:
        raise UserError(
            f"extend: got {inputs.extend} known frames, expected 1 to {window - 1}, less than a window of {window}"
        )
    given |= {name: _read(inputs, name, frames) for name, value in given.items() if isinstance(value, str)}
    if clip := [name for name in ("image", "last_image") if isinstance(given[name], list) and len(given[name]) != 1]:
        raise UserError(f"{clip[0]}: got {len(given[clip[0]])} pictures, expected one (a clip is a video)")
    taken = {name: _clips(value, name, height, width, clips) for name, value in given.items()}
    if taken["video"] is not None:
        taken |= _of_equal_length(taken["video"], taken["mask"], frames, inputs.extend)
    of_mask, of_video = _pixels(given["mask"]), _pixels(given["video"])
    if of_mask and of_video and of_mask != of_video:
        got, expected = ("x".join(map(str, size)) for size in (of_mask, of_video))
        raise UserError(f"mask: got {got} pixels for a video of {expected}, expected the same size")
    for name in ("image", "last_image"):
        if (one := taken[name]) is not None and one.shape[1] != 1:
            raise UserError(f"{name}: got {one.shape[1]} pictures, expected one (a clip is a video)")
    strength = default_strength(inputs)
    assert strength is not None
    return PixelInputs(
        **taken,
        strength=strength,
        inversion=inputs.inversion,
        extend=inputs.extend,
        image_ramp=inputs.image_ramp,
    )


def read_beside_video(path: Path, inputs: Inputs, frames: int, *, background: int = WHITE) -> Tensor:
    """At most `frames` frames (f, H, W, 3), uint8, of what belongs to the inputs' video, such as a mask.

    A file of more frames than that is as long as the video: it is read at the same start, stride and speed.
    """
    video, _ = read_video(path, most=frames + 1, background=background)
    if len(video) > frames:
        video, _ = read_video(path, most=frames, background=background, **_speed(inputs))
    return video


def _speed(inputs: Inputs) -> dict[str, Any]:
    return {"start": inputs.video_start, "stride": inputs.video_stride, "fps": inputs.video_fps}


def _read(inputs: Inputs, name: str, frames: int) -> list[Image.Image]:
    """The pictures of a file or folder; of a video that is extended all, else as many as the clip has."""
    path = find_file(getattr(inputs, name))
    with naming(name):
        if path is None:
            raise UserError(missing_file(getattr(inputs, name)))
        if name == "mask":
            video = read_beside_video(path, inputs, frames, background=BLACK)
        else:
            speed = _speed(inputs) if name == "video" else {}
            video, _ = read_video(path, most=None if inputs.extend and name == "video" else frames, **speed)
    return [Image.fromarray(frame) for frame in video.numpy()]


def _of_equal_length(video: Tensor, mask: Tensor | None, frames: int, extend: int) -> dict[str, Tensor | None]:
    """Video and mask, cut to as many frames as are asked for; a video that is extended stays whole."""
    if extend:
        if video.shape[1] >= frames:
            raise UserError(
                f"got {frames} frames in all, expected more than the {video.shape[1]} of the video that is extended: "
                f"set L (num_frames) to, say, {video.shape[1] + 16}"
            )
        return {"video": video, "mask": None}
    if mask is not None and 1 not in (mask.shape[1], video.shape[1]) and mask.shape[1] != video.shape[1]:
        raise UserError(f"mask: got {mask.shape[1]} frames for a video of {video.shape[1]}, expected as many, or one")
    return {
        "video": _as_long(video, "video", frames),
        "mask": None if mask is None else _as_long(mask, "mask", frames),
    }


def _as_long(clip: Tensor, name: str, frames: int) -> Tensor:
    """Its first frames, or the only one, which stands for all."""
    if 1 < clip.shape[1] < frames:
        raise UserError(
            f"{name}: got {clip.shape[1]} frames, expected at least {frames}: make a clip of {clip.shape[1]} "
            "(L, num_frames), or give a longer one (a single picture stands still)"
        )
    return clip[:, :frames]


def _pixels(value: Pictures) -> tuple[int, int] | None:
    """Width and height of pictures that are not of a clip's size yet."""
    if isinstance(value, Image.Image):
        return value.size
    return _pixels(value[0]) if isinstance(value, list | tuple) and value else None


def _clips(value: Pictures, name: str, height: int, width: int, clips: int) -> Tensor | None:
    """(b, f, 3, H, W) of what may be a picture, several, or lists of several; a mask as bool (b, f, 1, H, W)."""
    if value is None:
        return None
    gray = name == "mask"
    if isinstance(value, Tensor):
        taken = _of_tensor(value, name, height, width)
        taken = taken > 0.5 if gray else taken
    else:
        single = isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim < 4)
        lists = [value] if single else list(value)
        nested = isinstance(lists[0], (list, tuple)) if lists else False
        lists = lists if nested or (isinstance(value, np.ndarray) and value.ndim == 5) else [lists]
        if len({len(one) for one in lists}) > 1:
            raise UserError(
                f"{name}: got clips of {sorted({len(one) for one in lists})} frames, expected equal lengths"
            )
        with naming(name):
            pictures = [[as_picture(one) for one in clip] for clip in lists]
            taken = torch.stack([fit_frames(clip, height, width, mode="L" if gray else "RGB") for clip in pictures])
        taken = taken > 0 if gray else taken
    if len(taken) not in (1, clips):
        raise UserError(f"{name}: got {len(taken)} for {clips} clips, expected one, or one for each clip")
    return taken


def as_picture(value: Any) -> Image.Image:
    """A PIL image from one, or from an array (H, W), (H, W, 1) or (H, W, 3): uint8, or floats in [0, 1].

    Raises:
        UserError: something else.
    """
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3) or array.dtype.kind not in "fub":
        raise UserError(
            f"got a {type(value).__name__} of shape {array.shape}, expected PIL images, arrays (H, W, 3) of uint8 or "
            "of floats in [0, 1], or a tensor in [-1, 1]"
        )
    if array.dtype.kind == "f":
        if not array.size or not (array.min() >= 0 and array.max() <= 1):
            raise UserError("got an array of floats outside [0, 1], expected floats in [0, 1] or uint8")
        array = (array * 255).round()
    elif array.dtype.kind == "b":
        array = array * 255
    return Image.fromarray(array.astype(np.uint8))


def _of_tensor(value: Tensor, name: str, height: int, width: int) -> Tensor:
    """(b, f, c, H, W) in [-1, 1], a mask's in [0, 1]. uint8 counts 0 to 255; floats have to be in that range.

    A video of floats without any value below 0 is refused: nothing tells whether it is in [0, 1] or in [-1, 1].
    """
    gray = name == "mask"
    # a batch of pictures is one clip, but of `image` and `last_image` one for each clip
    form = {3: "c h w -> 1 1 c h w", 4: "f c h w -> 1 f c h w", 5: "b f c h w -> b f c h w"}
    form |= {4: "b c h w -> b 1 c h w"} if "image" in name else {}
    taken = rearrange(value.float(), form[value.ndim]) if value.ndim in form else value.float()
    if tuple(taken.shape[2:]) != (1 if gray else 3, height, width):
        shape = "(f, 1, H, W)" if gray else "(f, 3, H, W)"
        raise UserError(f"{name}: got shape {tuple(value.shape)}, expected {shape} with {height}x{width} pixels")
    if value.dtype == torch.uint8:
        return taken / 255 if gray else taken / 127.5 - 1
    least = 0.0 if gray else -1.0
    if not taken.numel() or not bool(((taken >= least - 1e-3) & (taken <= 1 + 1e-3)).all()):
        raise UserError(f"{name}: got no values or some outside the range, expected all in [{least:g}, 1]")
    if not gray and bool((taken >= 0).all()):
        raise UserError(
            f"{name}: got floats that are all 0 or more, expected [-1, 1]: give 2 * x - 1 if they are in [0, 1], or "
            "uint8, or PIL images"
        )
    return taken


def input_sha256(path: Path) -> str:
    """Hex SHA-256 of a picture or clip; of a folder, the hash of its pictures' names and hashes."""
    if not path.is_dir():
        return file_sha256(path)
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in list_pictures(path))
    return hashlib.sha256(lines.encode()).hexdigest()
