"""IP-Adapter files: released ones, what the training script and accelerate write -> modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from animatediff.checkpoints.files import StateDict, file_sha256, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.load import LoadReport, blank, load_strictly
from animatediff.checkpoints.mapped import converted
from animatediff.config.networks import IPAdapterConfig
from animatediff.models.ip_adapter_network import HEAD_WIDTH, IPAdapter, cross_attentions
from animatediff.models.unet import UNet
from animatediff.utils import UserError

OURS = re.compile(r"^(image_proj|ip_adapter)\.")
SPELLINGS = (("image_proj_model.", "image_proj."), ("adapter_modules.", "ip_adapter."))  # of the training script
BY_LAYER = re.compile(
    r"^unet\.((?:down_blocks|up_blocks|mid_block)\..+\.attn2)\.processor\.(to_[kv]_ip\.weight)$"
)  # of accelerate


@dataclass(frozen=True)
class IPAdapterParts:
    """An IP-Adapter in the released spelling."""

    path: Path
    kind: str
    tensors: StateDict
    metadata: dict[str, str]
    notes: list[str]
    unused: list[str]


def read_ip_adapter_parts(path: str | Path) -> IPAdapterParts:
    """Read an IP-Adapter in any spelling.

    Args:
        path: a released file (`.safetensors`, `.bin`), or a checkpoint of the training script or of accelerate.

    Raises:
        UserError: the file is something else, or needs a face recognition network.
    """
    path = Path(path)
    file = read_state_dict(path)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind not in ("ip-adapter", "sdxl-ip-adapter"):
        raise refusal(info, "an IP-Adapter for SD 1.x or SDXL")
    numbers = _layer_numbers(file.tensors)
    named = {_renamed(key, numbers): t for key, t in file.tensors.items()}
    tensors = {key: t for key, t in named.items() if OURS.match(key)}
    unused = [key for key in named if key not in tensors]
    notes = [*file.notes, *(["the file holds more than the adapter"] if unused else [])]
    return IPAdapterParts(path, info.kind, tensors, file.metadata, notes, unused)


def load_ip_adapter(path: str | Path, unet: UNet) -> tuple[IPAdapter, LoadReport]:
    """Load an IP-Adapter for a UNet, in its dtype and on its device, in evaluation mode.

    Args:
        path: as of `read_ip_adapter_parts`.

    Raises:
        UserError: the file is something else, incomplete, made for another model, or needs a face recognition network.
    """
    parts = read_ip_adapter_parts(path)
    path, config = parts.path, ip_adapter_config(parts.tensors, parts.path)
    if config.context_dim != (expected := unet.config.context_dim):
        raise UserError(
            f"{path}: got an IP-Adapter of context_dim {config.context_dim}, expected the base's {expected}: "
            "choose an IP-Adapter made for this base"
        )
    widths = tuple(layer.to_q.weight.shape[0] for layer in cross_attentions(unet).values())
    if config.layer_widths != widths:
        raise UserError(
            f"{path}: got an IP-Adapter for cross-attentions of widths {config.layer_widths}, expected the base's "
            f"{widths}: choose an IP-Adapter made for this base"
        )
    sample = next(unet.parameters())
    ready = converted(parts.tensors, sample.device, sample.dtype)
    adapter = load_strictly(blank(IPAdapter, config), ready, "IP-Adapter", path)
    report = LoadReport(
        path,
        parts.kind,
        config.variant,
        file_sha256(path),
        applied=len(ready),
        notes=parts.notes,
        unused=parts.unused,
    )
    return adapter, report


def write_ip_adapter(parts: IPAdapterParts, path: str | Path) -> Path:
    """Write an adapter in the released spelling: `.safetensors`, or a pickle of a dictionary for each of its parts.

    Raises:
        UserError: it lacks parts, or the suffix or the folder is unusable.
    """
    ip_adapter_config(parts.tensors, parts.path)
    tensors = dict(sorted(parts.tensors.items()))  # image_proj first, as old versions of diffusers insist
    return write_state_dict(path, tensors, metadata=parts.metadata, wrapper=None)


def save_ip_adapter(
    adapter: IPAdapter, path: str | Path, *, metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> Path:
    """Write an adapter in the released spelling; dtype: to store it in, its own by default."""
    return write_state_dict(
        Path(path), {k: t.to(dtype or t.dtype) for k, t in adapter.state_dict().items()}, metadata=metadata
    )


def ip_adapter_config(tensors: StateDict, path: Path) -> IPAdapterConfig:
    """Sizes of an adapter in the released spelling. Raises: UserError for one without its parts."""
    proj = "image_proj.proj"
    keys = {int(m[1]): t.shape for k, t in tensors.items() if (m := re.match(r"ip_adapter\.(\d+)\.to_k_ip\.weight", k))}
    if not keys:
        raise UserError(f"{path}: got an IP-Adapter without keys for any layer, expected ip_adapter.1.to_k_ip.weight …")
    layers = {"context_dim": keys[min(keys)][1], "layer_widths": tuple(keys[n][0] for n in sorted(keys))}
    if (latents := tensors.get("image_proj.latents")) is not None:
        inner, encoder = tensors["image_proj.layers.0.0.to_q.weight"], tensors["image_proj.proj_in.weight"]
        depth = len({key.split(".")[2] for key in tensors if key.startswith("image_proj.layers.")})
        sizes = {"tokens": latents.shape[1], "width": latents.shape[2], "depth": depth}
        return IPAdapterConfig(
            "plus", encoder_width=encoder.shape[1], num_heads=inner.shape[0] // HEAD_WIDTH, **sizes, **layers
        )
    if (first := tensors.get(f"{proj}.0.weight")) is not None:
        return IPAdapterConfig("full", encoder_width=first.shape[1], **layers)
    if (weight := tensors.get(f"{proj}.weight")) is None:
        raise UserError(f"{path}: got an IP-Adapter without image_proj, expected the whole file: choose another")
    return IPAdapterConfig(
        "base", encoder_width=weight.shape[1], tokens=weight.shape[0] // keys[min(keys)][1], **layers
    )


def _layer_numbers(keys: Iterable[str]) -> dict[str, int]:
    """The number of each cross-attention that accelerate's keys name, in the order of `cross_attentions`."""
    halves = ("down_blocks", "up_blocks", "mid_block")
    names = {match[1] for key in keys if (match := BY_LAYER.match(key))}

    def place(name: str) -> tuple[int, list[int]]:
        return halves.index(name.partition(".")[0]), [int(number) for number in re.findall(r"\.(\d+)", name)]

    order = sorted(names, key=place)
    return {name: 2 * i + 1 for i, name in enumerate(order)}


def _renamed(key: str, numbers: Mapping[str, int]) -> str:
    """A key in the released spelling."""
    if match := BY_LAYER.match(key):
        return f"ip_adapter.{numbers[match[1]]}.{match[2]}"
    for theirs, ours in SPELLINGS:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key
