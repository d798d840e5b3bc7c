"""ControlNet files: original (v1.0 inside a whole model, v1.1, bare, as differences) and diffusers' <-> modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from animatediff.checkpoints.diffusers_folders import model_folder, write_part
from animatediff.checkpoints.diffusers_json import UNET_STEM, Json, check_config, heads_in, unet_json
from animatediff.checkpoints.files import (
    StateDict,
    file_sha256,
    find_weights,
    read_json,
    read_state_dict,
    write_state_dict,
)
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.keymaps import Table, inverted, translate, unet_layout, unet_table
from animatediff.checkpoints.load import LoadReport, blank, load_strictly
from animatediff.checkpoints.mapped import converted
from animatediff.checkpoints.sizes import encoder_config
from animatediff.config.networks import ControlNetConfig, UNetConfig
from animatediff.models.controlnet_network import ControlNet
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError, naming

PREFIX = "control_model."  # of the original files
TIME_ID_CHANNELS = 256  # features of each of the sizes that SDXL is told
DIFFERENCE = "difference"  # an entry of this name: weights that the image model has too are differences to it


def controlnet_table(*, layers: int, attention_levels: tuple[bool, ...], hint_convs: int) -> Table:
    """Our ControlNet layers -> the original's, without PREFIX.

    Args:
        layers, attention_levels: as of `unet_table`.
        hint_convs: convolutions of the hint's CNN (8 in SD 1.5); a SiLU stands between any two.
    """
    table = unet_table(layers=layers, attention_levels=attention_levels)
    table = {
        ours: ldm for ours, ldm in table.items() if not ours.startswith(("up_blocks", "conv_norm_out", "conv_out"))
    }
    hint = "controlnet_cond_embedding"
    table |= {f"{hint}.conv_in": "input_hint_block.0", f"{hint}.conv_out": f"input_hint_block.{2 * (hint_convs - 1)}"}
    table |= {f"{hint}.blocks.{j}": f"input_hint_block.{2 * j + 2}" for j in range(hint_convs - 2)}
    skips = len(attention_levels) * (layers + 1)
    table |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(skips)}
    return table | {"controlnet_mid_block": "middle_block_out.0"}


@dataclass(frozen=True)
class ControlNetParts:
    """A ControlNet in our names. `metadata` is what shapes cannot tell (see `controlnet_config`).

    `differences`: weights that the image model has too are differences to it.
    """

    path: Path
    tensors: StateDict
    metadata: dict[str, str]
    differences: bool
    notes: list[str]
    unused: list[str]


def read_controlnet_parts(path: str | Path) -> ControlNetParts:
    """Read a ControlNet in any spelling.

    Args:
        path: an original file, one of diffusers, or diffusers' folder with its config.json.

    Raises:
        UserError: it is something else (named) or damaged.
    """
    path = Path(path)
    weights = find_weights(path, UNET_STEM, UNET_STEM) if path.is_dir() else path
    if weights is None:
        raise UserError(f"got the folder {path}, expected a ControlNet: it has no {UNET_STEM} file")
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if info.kind not in ("controlnet", "sdxl-controlnet"):
        raise refusal(info, "a ControlNet")
    notes = list(file.notes)
    tensors, unused = _named_as_ours(file.tensors)
    differences = tensors.pop(DIFFERENCE, None) is not None
    if differences:
        notes.append("weights are differences to the image model's")
    if unused:
        notes.append(f"the file holds a whole image model, of which nothing is used ({len(unused)} entries)")
    return ControlNetParts(path, tensors, _facts(weights) | file.metadata, differences, notes, unused)


def load_controlnet(path: str | Path, unet: UNet, vae: VAE) -> tuple[ControlNet, LoadReport]:
    """Load a ControlNet for an image model, in the UNet's dtype and on its device, in evaluation mode.

    Args:
        path: as of `read_controlnet_parts`.
        unet, vae: what it has to fit. Heads and norm groups are the UNet's where the file does not say; weights that
            the file has as differences are added to the UNet's.

    Raises:
        UserError: the file is something else, incomplete, or made for another model.
    """
    parts = read_controlnet_parts(path)
    path, tensors = parts.path, parts.tensors
    if parts.differences:
        base = unet.state_dict()
        same = {key for key, t in tensors.items() if key in base and base[key].shape == t.shape}
        tensors = {k: t.float() + base[k].to("cpu", torch.float32) if k in same else t for k, t in tensors.items()}
    with naming(path):
        config = controlnet_config(tensors, _base_facts(unet) | parts.metadata)
    _check_fits(config, unet, vae, path)
    sample = next(unet.parameters())
    ready = converted(tensors, sample.device, sample.dtype)
    network = load_strictly(blank(ControlNet, config), ready, "ControlNet", path)
    report = LoadReport(
        path, "controlnet", None, file_sha256(path), applied=len(ready), notes=parts.notes, unused=parts.unused
    )
    return network, report


def save_controlnet(
    network: ControlNet,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a ControlNet in the original names, or as a diffusers folder where `path` has no suffix.

    Args:
        metadata: strings to add to a file; what its shapes cannot tell is written by itself.
        dtype: to store the weights in, their own by default.
    """
    tensors = {key: t.to(dtype or t.dtype) for key, t in network.state_dict().items()}
    return _write(tensors, network.config, Path(path), metadata or {})


def write_controlnet(parts: ControlNetParts, path: str | Path) -> Path:
    """As `save_controlnet`, of a file that was read. Raises: UserError for one of differences to an image model."""
    if parts.differences:
        raise UserError(
            f"got {parts.path}, whose weights are differences to an image model, expected a whole ControlNet: "
            "use it as it is, they are added to the base's"
        )
    with naming(parts.path):
        config = controlnet_config(parts.tensors, parts.metadata)
    return _write(parts.tensors, config, Path(path), {})


def _write(tensors: StateDict, config: ControlNetConfig, path: Path, metadata: Mapping[str, str]) -> Path:
    if path.suffix:
        table = _table_of(config.unet, hint_convs=2 * len(config.hint_widths))
        named = {PREFIX + (translate(key, table) or key): t for key, t in tensors.items()}
        return write_state_dict(path, named, metadata={**metadata, **_facts_of(config)})
    with model_folder(path) as folder:
        write_part(folder, tensors, controlnet_json(config), metadata=metadata)
    return path


def controlnet_config(tensors: StateDict, metadata: Mapping[str, str]) -> ControlNetConfig:
    """Sizes of a ControlNet in our names.

    Args:
        metadata: as of `sizes.encoder_config`, and `global_pool_conditions`, `controlnet_conditioning_channel_order`.
    """
    hint = "controlnet_cond_embedding."
    widths = [tensors[key].shape[0]] if (key := f"{hint}conv_in.weight") in tensors else []
    while (key := f"{hint}blocks.{2 * len(widths) - 1}.weight") in tensors:
        widths.append(tensors[key].shape[0])
    if not widths:
        raise UserError(
            f"got weights without {hint}conv_in.weight, expected a complete ControlNet: choose another file"
        )
    return ControlNetConfig(
        unet=encoder_config(tensors, metadata),
        hint_channels=tensors[f"{hint}conv_in.weight"].shape[1],
        hint_widths=tuple(widths),
        pooled=metadata.get("global_pool_conditions", "").lower() == "true",
        bgr=metadata.get("controlnet_conditioning_channel_order", "rgb") == "bgr",
    )


def check_encoder_fits(what: str, ours: UNetConfig, theirs: UNetConfig, path: Path) -> None:
    """Compare an encoder's sizes with the UNet's that it is to steer.

    Args:
        what: the encoder is, such as "ControlNet".

    Raises:
        UserError: a size differs, which is named.
    """
    theirs = replace(theirs, motion=ours.motion, out_channels=ours.out_channels)
    for name in vars(ours):
        if (got := getattr(ours, name)) != (expected := getattr(theirs, name)):
            raise UserError(
                f"{path}: got a {what} of {name} {got}, expected the base's {expected}: "
                f"choose a {what} made for this base"
            )


def _named_as_ours(tensors: StateDict) -> tuple[StateDict, list[str]]:
    """A ControlNet's tensors in our names, and the other keys of a file that holds a whole image model."""
    unused: list[str] = []
    if any(key.startswith(PREFIX) for key in tensors):
        unused = [key for key in tensors if not key.startswith(PREFIX) and key != DIFFERENCE]
        tensors = {key.removeprefix(PREFIX): t for key, t in tensors.items() if key not in set(unused)}
    if any(key.startswith("input_hint_block.") for key in tensors):
        layers, attention_levels = unet_layout(tensors)
        hint_convs = len({key.split(".")[1] for key in tensors if key.startswith("input_hint_block.")})
        table = controlnet_table(layers=layers, attention_levels=attention_levels, hint_convs=hint_convs)
        back = inverted(table)
        tensors = {translate(key, back) or key: t for key, t in tensors.items()}
    if any(key.startswith("add_embedding.") for key in tensors):
        return dict(tensors), unused
    return {key: _projection(key, t) for key, t in tensors.items()}, unused


def _projection(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Some files have the 1x1 convolutions of SD 1.x around an attention as matrices, as SDXL has them."""
    matrix = tensor.dim() == 2 and key.endswith((".proj_in.weight", ".proj_out.weight"))
    return tensor[:, :, None, None] if matrix else tensor


def _table_of(config: UNetConfig, *, hint_convs: int) -> Table:
    return controlnet_table(
        layers=config.layers_per_block, attention_levels=config.attention_levels, hint_convs=hint_convs
    )


def _base_facts(unet: UNet) -> dict[str, str]:
    return heads_and_groups(unet.config)


def heads_and_groups(config: UNetConfig) -> dict[str, str]:
    """What shapes cannot tell of an encoder's image layers, as metadata."""
    heads = {"head_dim": str(config.head_dim)} if config.head_dim else {"num_heads": str(config.num_heads)}
    return heads | {"norm_num_groups": str(config.norm_num_groups)}


def _facts(weights: Path) -> dict[str, str]:
    """What a config.json beside the weights says, or the file's name: the shuffle model alone is pooled."""
    path = weights.with_name("config.json")
    config = read_json(path) if path.is_file() else {}
    if config.get("_class_name") != "ControlNetModel":
        return {"global_pool_conditions": "true"} if "shuffle" in weights.stem.lower() else {}
    check_config("unet", config, path)
    names = {
        "norm_num_groups": "norm_num_groups",
        "global_pool_conditions": "global_pool_conditions",
        "controlnet_conditioning_channel_order": "controlnet_conditioning_channel_order",
    }
    told = {ours: str(config[theirs]) for ours, theirs in names.items() if config.get(theirs) is not None}
    return told | {name: str(value) for name, value in heads_in(config).items() if value is not None}


def _facts_of(config: ControlNetConfig) -> dict[str, str]:
    facts = heads_and_groups(config.unet)
    if config.pooled:
        facts["global_pool_conditions"] = "true"
    return facts | ({"controlnet_conditioning_channel_order": "bgr"} if config.bgr else {})


def controlnet_json(config: ControlNetConfig) -> Json:
    """config.json of a ControlNetModel."""
    ours = ("_class_name", "center_input_sample", "mid_block_scale_factor", "out_channels", "sample_size")
    unet = unet_json(config.unet, time_id_channels=TIME_ID_CHANNELS)
    return {key: value for key, value in unet.items() if key not in (*ours, "up_block_types")} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
        "controlnet_conditioning_channel_order": "bgr" if config.bgr else "rgb",
        "global_pool_conditions": config.pooled,
    }


def _check_fits(config: ControlNetConfig, unet: UNet, vae: VAE, path: Path) -> None:
    made, wanted = (bool(sizes.added_channels) for sizes in (config.unet, unet.config))
    if made != wanted:
        names = ("SD 1.x", "SDXL")
        raise UserError(f"{path}: got a ControlNet for {names[made]}, expected one for {names[wanted]}, as the base is")
    check_encoder_fits("ControlNet", config.unet, unet.config, path)
    got, expected = 2 ** (len(config.hint_widths) - 1), vae.config.downsampling
    if got != expected:
        raise UserError(
            f"{path}: got a ControlNet for {got} pixels per latent, expected the VAE's {expected}: "
            "choose a ControlNet made for this base"
        )
