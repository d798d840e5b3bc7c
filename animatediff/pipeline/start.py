"""What a clip begins with where that is not noise alone: pictures and clips that a user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from animatediff.checkpoints.files import file_sha256
from animatediff.config.steering import Steering
from animatediff.diffusion.guidance import Denoise
from animatediff.diffusion.inversion import invert
from animatediff.diffusion.samplers import Callback
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.known_frames import hold, noised
from animatediff.features.windows import Windows
from animatediff.media.pictures import fit_frames
from animatediff.media.video import list_pictures, read_video
from animatediff.models.vae import VAE
from animatediff.pipeline.sampling import Sampling
from animatediff.utils import UserError, naming

INPUTS = ("video", "image", "last_image", "mask")
SETTINGS = ("strength", "inversion", "extend", "image_ramp")  # of `Given`, by the names of a config's keys
STRENGTHS = {"extend": 1.0, "mask": 1.0, "video": 0.8, "image": 0.9, "last_image": 0.9}  # the first that is given
DETERMINISTIC = ("ddim", "euler", "dpmpp_2m", "pndm")
Pictures = Tensor | Sequence[Any] | Image.Image | None


@dataclass(frozen=True)
class Given:
    """Pictures and clips at a clip's size, in [-1, 1], and how they are used (see `AnimateDiffPipeline.__call__`)."""

    video: Tensor | None  # (b, f, 3, H, W), b being 1 or one for each clip, f 1 (it stands still) or as many
    image: Tensor | None  # (b, 1, 3, H, W)
    last_image: Tensor | None
    mask: Tensor | None  # bool (b, f, 1, H, W), True where the clip is painted anew
    strength: float
    inversion: bool
    extend: int
    image_ramp: float

    def steps(self, steps: int) -> int:
        """How many of a sampler's steps are taken, the last ones; counted as diffusers counts them."""
        return min(int(steps * self.strength), steps)


@dataclass(frozen=True)
class Start:
    """Clean latents (b, f, c, h, w), the share of them (f,) that each frame begins with, and which stay (bool)."""

    clean: Tensor
    share: Tensor | float = 1.0
    held: Tensor | None = None

    def begin(
        self,
        noise: Tensor,
        *,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        all_steps: bool,
        unguided: Denoise | None = None,
    ) -> tuple[Tensor, Callback | None]:
        """Latents to sample from, and what is to be called after every step.

        Args:
            noise: standard normal, of the shape of `clean`.
            timesteps: (steps,), those to visit, none included.
            all_steps: none was left out: sampling starts at the noise itself.
            unguided: a denoiser for DDIM inversion, which takes the place of the noise.
        """
        if not len(timesteps):
            return self.clean, None
        alpha = float(schedule.alpha_at(timesteps[0]))
        if unguided is not None:
            x = invert(unguided, self.clean, schedule=schedule, timesteps=timesteps)
            noise = (x - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
        else:
            share = torch.as_tensor(self.share).reshape(-1, 1, 1, 1)
            x = noise if all_steps else noised(self.clean, noise, alpha, share)
        if self.held is None:
            return x, None
        x = torch.where(self.held, noised(self.clean, noise, alpha), x)
        return x, hold(self.clean, noise, self.held, schedule=schedule, timesteps=timesteps)


# ---- what the user gives --------------------------------------------------------------------------------------


def take_given(
    *,
    video: Pictures = None,
    image: Pictures = None,
    last_image: Pictures = None,
    mask: Pictures = None,
    strength: float | None = None,
    inversion: bool = False,
    extend: int = 0,
    image_ramp: float = 32.0,
    frames: int,
    height: int,
    width: int,
    window: int,
    clips: int = 1,
) -> Given | None:
    """Check the arguments of `AnimateDiffPipeline.__call__` and bring pictures to the clip's size; None without any.

    Args:
        frames, height, width, clips: what is asked for.
        window: frames of a chain's window (`chain_window`).

    Raises:
        UserError: something is missing, out of its range, of another size, or does not go with another.
    """
    pictures = {"video": video, "image": image, "last_image": last_image, "mask": mask}
    asked = pictures | {"extend": extend or None, "inversion": inversion or None}
    present = {name for name, value in asked.items() if value is not None}
    _check_together(present, strength)
    if not present:
        return None
    if not image_ramp > 0:
        raise UserError(f"image_ramp: got {image_ramp:g} frames, expected more than 0")
    if not 0 <= extend < window:
        raise UserError(
            f"extend: got {extend} known frames, expected 1 to {window - 1}, less than a window of {window}"
        )
    taken = {name: _clips(value, name, height, width, clips) for name, value in pictures.items()}
    if taken["video"] is not None:
        taken |= _of_equal_length(taken["video"], taken["mask"], frames, extend)
    of_mask, of_video = _pixels(mask), _pixels(video)
    if of_mask and of_video and of_mask != of_video:
        got, expected = ("x".join(map(str, size)) for size in (of_mask, of_video))
        raise UserError(f"mask: got {got} pixels for a video of {expected}, expected the same size")
    for name in ("image", "last_image"):
        if (one := taken[name]) is not None and one.shape[1] != 1:
            raise UserError(f"{name}: got {one.shape[1]} pictures, expected one (a clip is a video)")
    if frames == 1 and present >= {"image", "last_image"}:
        raise UserError("got image and last_image for a clip of 1 frame, expected at least 2: raise L (num_frames)")
    default = next(value for name, value in STRENGTHS.items() if name in present)
    return Given(
        **taken,
        strength=default if strength is None else strength,
        inversion=inversion,
        extend=extend,
        image_ramp=image_ramp,
    )


def check_start(given: Given, sampling: Sampling, steering: Steering) -> None:
    """Raises: UserError for a clip without a beginning that goes on, or an inversion whose noise would be forgotten."""
    if given.extend and steering.loop == "rotate":
        raise UserError("loop: got rotate with extend, expected one of them: a clip that goes on is no loop")
    if not given.inversion:
        return
    if sampling.sampler not in DETERMINISTIC or sampling.eta:
        what = f"eta {sampling.eta:g}" if sampling.eta else f"the sampler {sampling.sampler}"
        raise UserError(
            f"inversion: got {what}, which adds noise of its own, expected one of {', '.join(DETERMINISTIC)} with eta 0"
        )


def _check_together(present: Collection[str], strength: float | None) -> None:
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"strength: got {strength:g}, expected 0 (nothing changes) to 1 (nothing is kept)")
    if strength is not None and not present:
        raise UserError("strength: got one with nothing to start from, expected a video or image: remove strength")
    for name in ("mask", "inversion", "extend"):
        if name in present and "video" not in present:
            raise UserError(f"{name}: got it without a video, expected one: add a video, or remove {name}")
    for one, other in (("video", "image"), ("video", "last_image"), ("extend", "mask"), ("extend", "inversion")):
        if one in present and other in present:
            raise UserError(f"got both {one} and {other}, expected one of them: remove the other")


def _of_equal_length(video: Tensor, mask: Tensor | None, frames: int, extend: int) -> dict[str, Tensor | None]:
    """Video and mask, cut to as many frames as are asked for; a video that goes on stays whole."""
    if extend:
        if video.shape[1] >= frames:
            raise UserError(
                f"got {frames} frames in all, expected more than the {video.shape[1]} of the video that goes on: set "
                f"L (num_frames) to, say, {video.shape[1] + 16}"
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
        # a batch of pictures is one clip, but of `image` and `last_image` one for each clip
        form = {3: "c h w -> 1 1 c h w", 4: "f c h w -> 1 f c h w", 5: "b f c h w -> b f c h w"}
        form |= {4: "b c h w -> b 1 c h w"} if "image" in name else {}
        taken = rearrange(value.float(), form[value.ndim]) if value.ndim in form else value.float()
        least = 0.0 if gray else -1.0
        if tuple(taken.shape[2:]) != (1 if gray else 3, height, width):
            shape = "(f, 1, H, W)" if gray else "(f, 3, H, W)"
            raise UserError(f"{name}: got shape {tuple(value.shape)}, expected {shape} with {height}x{width} pixels")
        if not taken.numel() or not bool(((taken >= least - 1e-3) & (taken <= 1 + 1e-3)).all()):
            raise UserError(f"{name}: got no values or some outside the range, expected all in [{least:g}, 1]")
        taken = taken > 0.5 if gray else taken
    else:
        lists = [value] if isinstance(value, Image.Image) else list(value)
        lists = lists if lists and isinstance(lists[0], Sequence) else [lists]
        if len({len(one) for one in lists}) > 1:
            raise UserError(
                f"{name}: got clips of {sorted({len(one) for one in lists})} frames, expected equal lengths"
            )
        mode = "L" if gray else "RGB"
        taken = torch.stack([fit_frames(one, height, width, mode=mode) for one in lists])
        taken = taken > 0 if gray else taken
    if len(taken) not in (1, clips):
        raise UserError(f"{name}: got {len(taken)} for {clips} clips, expected one, or one for each clip")
    return taken


def read_inputs(files: Mapping[str, Path], *, frames: int, extend: int) -> dict[str, list[Image.Image]]:
    """The pictures of a config's files, by the arguments of `take_given`.

    Args:
        files: by key; others than those of INPUTS are passed over.
        frames: as many are read of a clip or folder; of a video that goes on, all.

    Raises:
        UserError: what `read_video` refuses.
    """
    pictures = {}
    for key in INPUTS:
        if key in files:
            with naming(key):
                video, _ = read_video(files[key], most=None if extend and key == "video" else frames)
            pictures[key] = [Image.fromarray(frame) for frame in video.numpy()]
    return pictures


def input_sha256(path: Path) -> str:
    """Hex SHA-256 of a picture or clip; of a folder, the hash of its pictures' names and hashes."""
    if not path.is_dir():
        return file_sha256(path)
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in list_pictures(path))
    return hashlib.sha256(lines.encode()).hexdigest()


# ---- into latents ---------------------------------------------------------------------------------------------


def encode_start(given: Given, vae: VAE, *, frames: int, clips: int, device: torch.device) -> Start:
    """What is given, in latents: the video with its mask, or the pictures at either end of the clip.

    A video that is to go on is all that `clean` holds.
    """

    def encode(video: Tensor) -> Tensor:
        latents = vae.encode_video(video.to(device)).float()
        return repeat(latents, "b f c h w -> (v b) f c h w", v=clips // len(latents))

    if given.video is None:
        first, last = (encode(i) if i is not None else None for i in (given.image, given.last_image))
        return between(first, last, frames, ramp=given.image_ramp)
    held = None if given.mask is None else ~_cells(given.mask, vae.config.downsampling).to(device)
    clean = encode(given.video)
    if clean.shape[1] == 1 and not given.extend:
        clean = repeat(clean, "b 1 c h w -> b f c h w", f=frames)
    return Start(clean, held=held)


def between(first: Tensor | None, last: Tensor | None, frames: int, *, ramp: float) -> Start:
    """Frames that are given at the beginning (b, k, c, h, w) or the end, held, and others that start off like them.

    A frame begins as a mixture of the nearest on either side, the nearer one prevailing. What is left of it falls
    from 1 to 0 in `ramp` frames.
    """
    place = torch.arange(frames)
    after = place - (first.shape[1] - 1) if first is not None else None  # frames since the last one at the beginning
    before = frames - last.shape[1] - place if last is not None else None  # frames until the first one at the end
    shares = [(1 - distance.clamp(min=0) / ramp).clamp(min=0) for distance in (after, before) if distance is not None]
    share = torch.stack(shares).amax(dim=0)
    held = torch.stack([distance <= 0 for distance in (after, before) if distance is not None]).any(dim=0)
    if first is not None and last is not None:
        part = (after / (after + before)).clamp(0, 1).to(first).reshape(-1, 1, 1, 1)
        middle = torch.lerp(first[:, -1:], last[:, :1], part)
    else:
        edge = first[:, -1:] if first is not None else last[:, :1]  # type: ignore[index]
        middle = edge.expand(-1, frames, -1, -1, -1)
    clean = middle.clone()
    if first is not None:
        clean[:, : first.shape[1]] = first
    if last is not None:
        clean[:, frames - last.shape[1] :] = last
    return Start(clean, share, held.reshape(-1, 1, 1, 1).to(clean.device))


def _cells(mask: Tensor, downsampling: int) -> Tensor:
    """bool (b, f, 1, h, w): latents of which any pixel is to be painted anew."""
    flat = rearrange(mask.float(), "b f 1 h w -> b f h w")
    return rearrange(F.max_pool2d(flat, downsampling) > 0, "b f h w -> b f 1 h w")


# ---- a clip that goes on --------------------------------------------------------------------------------------


def chain_window(max_frames: int | None) -> int:
    """Frames of a chain's windows: what motion modules are trained on, or as many as this one takes."""
    return min(Windows.length, max_frames or Windows.length)


def links(known: int, frames: int, *, window: int, overlap: int) -> list[tuple[int, int]]:
    """The windows of frames (first, end) that take a clip from `known` frames to `frames`, one after the other.

    Each has `window` frames, if there are as many, and begins with `overlap` known ones or more.
    """
    found = []
    while known < frames:
        known = min(max(known - overlap, 0) + window, frames)
        found.append((max(known - window, 0), known))
    return found


def go_on(
    sample: Callable[[Tensor, Start, int], Tensor],
    known: Tensor,
    noise: Tensor,
    *,
    window: int,
    overlap: int,
    ramp: float,
) -> Tensor:
    """A clip that begins with `known` (b, k, c, h, w), which stays, and goes on in a chain of windows.

    Args:
        sample: (noise, start, number of the first frame) -> clean latents of a window.
        noise: (b, f, c, h, w), of the whole clip.
        window, overlap: frames of a window, and those of them, at least, that are known.
        ramp: as for `between`.
    """
    for first, end in links(known.shape[1], noise.shape[1], window=window, overlap=overlap):
        start = between(known[:, first:], None, end - first, ramp=ramp)
        known = torch.cat([known[:, :first], sample(noise[:, first:end], start, first)], dim=1)
    return known
