"""Weight files to modules. Strict: every weight of a network must be there and nothing else, or the error says why."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from animatediff.checkpoints.files import StateDict, begin_hashing, file_sha256
from animatediff.checkpoints.keymaps import MOTION_MARK
from animatediff.checkpoints.mapped import converted
from animatediff.checkpoints.metadata import motion_norm_groups, prediction_type, schedule_facts, schedule_metadata
from animatediff.checkpoints.parts import (
    ImageParts,
    MotionParts,
    read_image_parts,
    read_motion_parts,
    read_vae_parts,
)
from animatediff.checkpoints.sizes import (
    image_metadata_of,
    motion_config,
    motion_widths,
    text_config,
    unet_config,
    vae_config,
    vae_metadata_of,
)
from animatediff.checkpoints.weight_checks import check_finite
from animatediff.config.networks import ScheduleConfig, VAEConfig
from animatediff.models.text import TextEncoder
from animatediff.models.twins import share_weights
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError, naming

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LoadReport:
    """What loading one file did. `applied` counts tensors; `unused` names entries left out, `notes` say why."""

    path: Path
    kind: str
    version: str | None
    sha256: str
    applied: int
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        notes = "".join(f"; {note}" for note in self.notes)
        unused = f"; {len(self.unused)} entries not used" if self.unused else ""
        return f"{self.path}: {self.kind}{version}, {self.applied} tensors, sha256 {self.sha256[:10]}{notes}{unused}"


@dataclass(frozen=True)
class ImageModel:
    """Stable Diffusion 1.x or XL. `schedule` is what the file says of `prediction_type`,
    `rescale_betas_zero_snr` and `timestep_spacing`, None where it says nothing; its other fields are defaults.

    SDXL has both text encoders, its refiner the second alone.
    """

    unet: UNet
    vae: VAE | None
    text_encoder: TextEncoder | None
    schedule: ScheduleConfig | None
    report: LoadReport
    text_encoder_2: TextEncoder | None = None


def load_base(path: str | Path, *, dtype: torch.dtype = torch.float32) -> ImageModel:
    """Load an image model on the CPU, in evaluation mode.

    Args:
        path: a single file (LDM keys) or a diffusers folder, of SD 1.x or SDXL.
        dtype: of all networks, whatever the file holds.

    Raises:
        UserError: the file is something else or incomplete. A missing VAE alone is no error: `vae` is None.
    """
    begin_hashing(path)
    parts = read_image_parts(path)
    if parts.text is None and parts.text_2 is None:
        raise UserError(f"got {path} without a text encoder, expected a whole image model: choose a complete file")
    return _build_image_model(parts, dtype=dtype)


def load_personalised(path: str | Path, base: ImageModel) -> ImageModel:
    """Load a model personalised from `base` (DreamBooth and the like), in the base's dtype and on its device.

    What the file lacks is taken from `base` and noted: the VAE, the text encoder, and what metadata would say.
    `base` itself stays as it is.

    Raises:
        UserError: the file is something else, incomplete, or of other sizes than the base.
    """
    begin_hashing(path)
    parts = read_image_parts(path)
    sample = next(base.unet.parameters())
    known = image_metadata_of(
        base.unet.config,
        base.vae and base.vae.config,
        base.text_encoder and base.text_encoder.config,
        base.text_encoder_2 and base.text_encoder_2.config,
    )
    if base.schedule:
        known |= schedule_metadata(base.schedule)
    if own := prediction_type(parts.stated):
        known["prediction_type"] = own
    parts = replace(parts, stated=known | parts.stated)
    return _build_image_model(parts, dtype=sample.dtype, device=sample.device, base=base)


def load_vae(path: str | Path, image: ImageModel) -> tuple[VAE, LoadReport]:
    """A VAE to take the place of an image model's, in the model's dtype and on its device.

    Args:
        path: a VAE's own file or folder, or a whole image model, whose VAE is taken.
        image: stays as it is; says scaling factor and norm groups where the file does not.

    Raises:
        UserError: the file is something else, incomplete, or does not fit the latents of `image`.
    """
    parts = read_vae_parts(path)
    known = vae_metadata_of(image.vae.config) if image.vae else {}
    with naming(parts.path):
        config = vae_config(parts.tensors, known | parts.metadata)
    _check_vae_fits(config, image, parts.path)
    sample = next(image.unet.parameters())
    tensors = converted(parts.tensors, sample.device, sample.dtype)
    vae = load_strictly(blank(VAE, config), tensors, "VAE", parts.path)
    notes = list(parts.notes)
    if image.vae and config.scaling_factor != (factor := image.vae.config.scaling_factor):
        notes.append(f"its scaling factor is {config.scaling_factor:g}, the image model's {factor:g}")
    report = LoadReport(
        path=parts.path,
        kind="vae",
        version=None,
        sha256=file_sha256(parts.path),
        applied=len(tensors),
        notes=notes,
        unused=parts.unused,
    )
    return vae, report


def load_motion_module(
    unet: UNet, path: str | Path, *, version: str | None = None, norm_over_frames: bool = False
) -> tuple[UNet, LoadReport]:
    """A video UNet: the image weights of `unet`, the same tensors and not copies, plus the file's motion module.

    Args:
        unet: any UNet; its own motion module, if it has one, is left behind.
        path: an official motion module, a training checkpoint that holds one, a MotionAdapter file or folder.
        version: a key of MOTION_VERSIONS, needed only where the file does not tell.
        norm_over_frames: let the module's GroupNorm pool over frames, as diffusers runs it.

    Returns:
        The UNet, in `unet`'s dtype and on its device, and what was loaded.

    Raises:
        UserError: the file is something else, incomplete, does not fit `unet`, or contradicts `version`.
    """
    parts = read_motion_parts(path)
    _check_motion_fits(parts, unet)
    sample = next(unet.parameters())
    with naming(parts.path):
        config = motion_config(
            parts.tensors,
            parts.metadata,
            levels=len(unet.config.block_out_channels),
            length=parts.length,
            version=version,
            norm_over_frames=norm_over_frames,
        )
    image = {key: tensor for key, tensor in unet.state_dict().items() if MOTION_MARK not in key}
    motion = converted(parts.tensors, sample.device, sample.dtype)
    network = blank(UNet, unet.config.with_motion(config))
    merged = load_strictly(network, image | motion, "motion module", parts.path)
    report = LoadReport(
        path=parts.path,
        kind=parts.kind,
        version=config.version,
        sha256=file_sha256(parts.path),
        applied=len(motion),
        notes=parts.notes,
        unused=parts.unused,
    )
    return merged, report


def _build_image_model(
    parts: ImageParts, *, dtype: torch.dtype, device: torch.device | str = "cpu", base: ImageModel | None = None
) -> ImageModel:
    metadata, notes = parts.metadata, list(parts.notes)

    def build(module: Callable[..., Any], sizes: Callable[..., object], tensors: StateDict, what: str) -> Any:
        with naming(parts.path):
            config = sizes(tensors, metadata)
        return load_strictly(blank(module, config), converted(tensors, device, dtype), what, parts.path)

    vae, texts = None, {"text": None, "text_2": None}
    if base:
        vae, texts = base.vae, {"text": base.text_encoder, "text_2": base.text_encoder_2}
    unet = build(UNet, unet_config, parts.unet, "UNet")
    if parts.vae:
        vae = build(VAE, vae_config, parts.vae, "VAE")
    else:
        notes.append("no VAE in it: the base model's is used" if vae else "no VAE in it")
    for name, what in (("text", "text encoder"), ("text_2", "second text encoder")):
        if tensors := getattr(parts, name):
            texts[name] = build(TextEncoder, partial(text_config, name=name), tensors, what)
        elif texts[name]:
            notes.append(f"no {what} in it: the base model's is used")
    _check_together(unet, vae, [encoder for encoder in texts.values() if encoder], parts.path)
    with naming(parts.path):
        facts = schedule_facts(metadata)
    report = LoadReport(
        path=parts.path,
        kind=parts.kind,
        version=None,
        sha256=file_sha256(parts.path),
        applied=sum(len(part) for part in (parts.unet, parts.vae, parts.text, parts.text_2) if part),
        notes=notes,
        unused=parts.unused,
    )
    schedule = ScheduleConfig(**facts) if facts else None
    return ImageModel(unet, vae, texts["text"], schedule, report, texts["text_2"])


class without_initialization(TorchFunctionMode):
    """Weights stay as they are made; to draw them on the meta device torch would import its compiler, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=32)
def blank(network: Callable[..., M], *sizes: Hashable) -> M:
    """A network on the meta device; made once for all files of these sizes, so not to be changed."""
    return build_blank(partial(network, *sizes))


def build_blank(network: Callable[[], M]) -> M:
    """The same for one file, where its sizes cannot be compared."""
    with torch.device("meta"), without_initialization():
        return network().eval()


def load_strictly(network: M, tensors: StateDict, what: str, path: Path) -> M:
    """A network like this `blank` one on the tensors themselves: nothing is initialised or copied.

    Raises:
        UserError: they are not the network's weights, all of them and nothing else, or not finite.
    """
    places = network.state_dict(keep_vars=True)
    expected = {key: tuple(t.shape) for key, t in places.items()}
    got = {key: tuple(t.shape) for key, t in tensors.items()}
    problems = []
    if missing := sorted(expected.keys() - got.keys()):
        problems.append(f"{len(missing)} weights are missing, such as {missing[0]}")
    if extra := sorted(got.keys() - expected.keys()):
        problems.append(f"{len(extra)} weights have no place in it, such as {extra[0]}")
    if wrong := sorted(key for key in expected.keys() & got.keys() if expected[key] != got[key]):
        key = wrong[0]
        problems.append(f"{len(wrong)} weights have another shape, such as {key} {got[key]} for {expected[key]}")
    if problems:
        raise UserError(
            f"got {path}, expected a complete {what} of the size its first layers suggest: {'; '.join(problems)}; "
            "`python scripts/doctor.py` says what the file is"
        )
    check_finite(tensors, path)
    return share_weights(network, {id(place): tensors[key] for key, place in places.items()})


def _check_motion_fits(parts: MotionParts, unet: UNet) -> None:
    base = unet.config.block_out_channels
    widths = motion_widths(parts.tensors)
    pairs = [(widths, base), (motion_widths(parts.tensors, side="up"), base[::-1])]
    if any(i >= len(own) or own[i] != width for blocks, own in pairs for i, width in blocks.items()):
        raise UserError(
            f"got {parts.path}, a motion module of widths {_listed(widths[i] for i in sorted(widths))}, "
            f"for a base model of widths {_listed(base)}: choose a motion module made for this base"
        )
    groups, base_groups = motion_norm_groups(parts.metadata), unet.config.norm_num_groups
    if "norm_num_groups" in parts.metadata and groups != base_groups:
        raise UserError(
            f"got {parts.path}, a motion module trained with {groups} norm groups, for a base model of {base_groups}: "
            "choose a motion module made for this base"
        )


def _check_vae_fits(config: VAEConfig, image: ImageModel, path: Path) -> None:
    sizes = [("latent channels", config.latent_channels, image.unet.config.in_channels)]
    if image.vae:
        own = image.vae.config
        sizes += [
            ("image channels", config.in_channels, own.in_channels),
            ("pixels to a latent's side", config.downsampling, own.downsampling),
        ]
    for what, got, expected in sizes:
        if got != expected:
            raise UserError(
                f"got {path}, a VAE of {got} {what}, for an image model of {expected}: choose a VAE made for this base"
            )


def _check_together(unet: UNet, vae: VAE | None, texts: Sequence[TextEncoder], path: Path) -> None:
    context, width = unet.config.context_dim, sum(encoder.config.width for encoder in texts)
    if context != width:
        which = "the text encoder's" if len(texts) == 1 else "that of both text encoders"
        raise UserError(f"got {path} whose UNet takes text of width {context}, expected {width}, {which}")
    if vae and vae.config.latent_channels != unet.config.in_channels:
        raise UserError(
            f"got {path} whose UNet takes {unet.config.in_channels} latent channels, "
            f"expected {vae.config.latent_channels}, the VAE's"
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
