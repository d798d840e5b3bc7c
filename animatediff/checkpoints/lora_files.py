"""LoRA files of every dialect and algorithm, read into a `animatediff.models.lora.LoRA`, and written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animatediff.checkpoints.diffusers_json import UNET_STEM
from animatediff.checkpoints.files import find_weights, parse_json, read_json, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.lora_keys import (
    EMBEDDING_PREFIX,
    GAIN_ENDING,
    LORA_STEMS,
    PEFT_PREFIX,
    lora_base,
    lora_keys,
    path_of,
    split_ending,
    target_of,
    unsupported_lora,
)
from animatediff.checkpoints.weight_checks import check_finite
from animatediff.models.lora import LoRA
from animatediff.models.lora_layers import LoRAEntry
from animatediff.utils import UserError, naming

# What an algorithm needs; of several in one place any.
REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "lora": (("down",), ("up",)),
    "loha": (("w1_a",), ("w1_b",), ("w2_a",), ("w2_b",)),
    "lokr": (("w1", "w1_a"), ("w1", "w1_b"), ("w2", "w2_a"), ("w2", "w2_b")),
    "ia3": (("gain", "factors"),),
    "full": (("weight", "bias"),),
    "oft": (("blocks",),),
    "glora": (("a1",), ("a2",), ("b1",), ("b2",)),
}
DIFFUSERS_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.")  # of keys that the config in the metadata is about
SCALARS = ("alpha", "scale", "on_input")


def read_lora(path: str | Path, *, name: str | None = None) -> LoRA:
    """Read a LoRA of any dialect; which network it fits is found out when it is attached.

    alpha comes from the file's own `.alpha` tensors, or from the PEFT configuration that diffusers keeps in the
    safetensors metadata and PEFT in `adapter_config.json` beside the file. MotionLoRA and domain adapter have none
    (dW = scale * up @ down). AnimateLCM's companion LoRA is trained with alpha 8 at rank 64, i.e. 1/8: as a kohya
    file with its alphas it needs nothing special; from a copy without them, use an eighth of the scale.

    Args:
        path: .safetensors, .ckpt, .pt or .bin, or a folder of diffusers or PEFT that holds one.
        name: what to call it in reports and scales; the file's (or folder's) stem by default.

    Raises:
        UserError: the file is something else (named), of an algorithm that is not known, or incomplete.
    """
    path = Path(path)
    weights = find_lora(path)
    file = read_state_dict(weights)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if "lora" not in info.kind and info.kind not in ("domain-adapter", "unknown"):
        raise refusal(info, "a LoRA")
    check_finite(file.tensors, path)
    config = weights.with_name("adapter_config.json")
    with naming(path):
        return parse_lora(
            file.tensors,
            name=name or (path.name if path.is_dir() else path.stem),
            metadata=file.metadata,
            peft_config=read_json(config) if config.is_file() else None,
        )


def find_lora(path: Path) -> Path:
    """The weight file of a LoRA; of a folder the one that diffusers or PEFT puts there.

    Raises:
        UserError: a folder without.
    """
    if not path.is_dir():
        return path
    for stem in (*LORA_STEMS, UNET_STEM):
        if found := find_weights(path, stem, stem):
            return found
    raise UserError(f"got the folder {path}, expected a LoRA: it has no {LORA_STEMS[0]}, give the file itself")


def parse_lora(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    metadata: dict[str, str] | None = None,
    peft_config: dict | None = None,
) -> LoRA:
    """Turn a LoRA's state dict into a `LoRA`. Dialect and algorithm are decided for every layer.

    Args:
        tensors: key -> tensor, in any dialect.
        name: what to call it.
        metadata: the file's, kept as it is.
        peft_config: the LoraConfig of a PEFT file (lora_A, lora_B) whose metadata has none.

    Raises:
        UserError: see `read_lora`.
    """
    metadata = metadata or {}
    if what := unsupported_lora(tensors):
        raise UserError(f"this is {what}, expected a LoRA for SD 1.x or SDXL: use one that was made for it")
    groups: dict[str, dict[str, str]] = {}  # target -> tensor's name -> key
    algorithms: dict[str, str] = {}  # target -> algorithm
    embeddings: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key in tensors:
        stem, algorithm, part = split_ending(key)
        if key.endswith(GAIN_ENDING) and (gain := key.removesuffix(GAIN_ENDING)) + ".on_input" in tensors:
            stem, algorithm, part = gain, "ia3", "gain"
        target = target_of(stem) if part else None
        if key.startswith(EMBEDDING_PREFIX) and tensors[key].dim() in (1, 2):
            word, _, inner = key.removeprefix(EMBEDDING_PREFIX).partition(".")
            embeddings.setdefault(word, {})[inner] = tensors[key]
        elif target is None:
            unread.append(key)
        elif (other := _rival(part, algorithm, groups.setdefault(target, {}), algorithms.get(target))) is not None:
            raise UserError(f"got both {other} and {key} for one layer, expected one: remove either")
        else:
            groups[target][part] = key
            if algorithm:
                algorithms[target] = algorithm
    embedded = _embedded_config(metadata)
    entries = []
    for target, keys in groups.items():
        algorithm = algorithms.get(target, "full" if "bias" in keys else None)
        if algorithm is None:
            unread += keys.values()
        else:
            entries.append(_entry(target, algorithm, keys, tensors, embedded, peft_config or {}))
    if not entries:
        raise UserError(
            f"got no LoRA weights for a UNet or text encoder of SD 1.x or SDXL (keys such as "
            f"{', '.join(list(tensors)[:2])}), expected pairs like lora_down and lora_up: choose another file"
        )
    base = lora_base(tensors, metadata)
    return LoRA(name, _kind(entries), tuple(entries), metadata, tuple(unread), base=base, embeddings=embeddings)


def _rival(part: str, algorithm: str | None, keys: dict[str, str], other: str | None) -> str | None:
    """The key of the same layer that this one cannot stand beside."""
    if part in keys:
        return keys[part]
    return next(iter(keys.values())) if algorithm and other and algorithm != other else None


def write_lora(lora: LoRA, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a LoRA under its entries' own `keys` (see `lora_keys`); `read_lora` reads it back.

    Raises:
        UserError: the suffix or the folder is unusable.
    """
    tensors = {}
    for entry in lora.entries:
        values = entry.tensors | ({} if entry.alpha is None else {"alpha": torch.tensor(entry.alpha)})
        for name, key in entry.keys.items():
            tensors[key] = values[name].detach().to(dtype or values[name].dtype)
    return write_state_dict(path, tensors, metadata=lora.metadata)


def in_dialect(lora: LoRA, dialect: str) -> LoRA:
    """The same changes under the keys of "kohya", "diffusers" (PEFT) or "official" (AnimateDiff's), for `write_lora`.

    The last two have no alpha and no Tucker form: both are multiplied into the factors.

    Raises:
        UserError: an algorithm that the other dialect does not have.
    """
    entries = []
    for entry in lora.entries:
        if entry.algorithm != "lora" or entry.tensors.keys() - {"down", "up", "mid"}:
            what = "dora" if "magnitude" in entry.tensors else entry.algorithm
            raise UserError(
                f"got LoRA {lora.name} whose {path_of(entry.target)} is no plain LoRA ({what}), expected "
                "linear and convolution LoRAs only: the dialects have no common form of it; use the file as it is"
            )
        network, path, tensors = entry.target.partition(".")[0], path_of(entry.target), dict(entry.tensors)
        if dialect == "official" and not (network == "unet" and re.search(r"\.to_(q|k|v|out\.0)$", path)):
            raise UserError(
                f"got LoRA {lora.name} with {path}, expected attentions of a UNet only, as MotionLoRAs and domain "
                "adapters change: choose another format"
            )
        if dialect != "kohya":
            if (mid := tensors.pop("mid", None)) is not None:
                folded = torch.einsum("rskl,si->rikl", mid.float(), tensors["down"].float().flatten(1))
                tensors["down"] = folded.to(mid.dtype)
            tensors["up"] = (tensors["up"].float() * entry.factor()).to(tensors["up"].dtype)
            kind = "diffusers" if dialect == "diffusers" else "motion-lora"
            entries.append(LoRAEntry(entry.target, tensors, keys=lora_keys(kind, network, path)))
        else:
            alpha = float(entry.rank) if entry.alpha is None else entry.alpha
            keys = lora_keys("lora", network, path, names=(*tensors, "alpha"), sdxl=lora.base == "SDXL")
            entries.append(LoRAEntry(entry.target, tensors, alpha, keys=keys))
    metadata = {k: v for k, v in lora.metadata.items() if k != "lora_adapter_metadata"}  # its alphas are folded in
    return replace(lora, kind="lora", entries=tuple(entries), metadata=metadata)


# --- one layer -------------------------------------------------------------------------------------------------------


def _entry(
    target: str,
    algorithm: str,
    keys: dict[str, str],
    tensors: Mapping[str, Tensor],
    embedded: Mapping[str, Any],
    beside: Mapping[str, Any],
) -> LoRAEntry:
    """embedded, beside: the configurations in the file's metadata and in adapter_config.json."""
    first = next(iter(keys.values()))
    for choice in REQUIRED[algorithm]:
        if not keys.keys() & set(choice):
            raise UserError(
                f"got {first} without its {choice[0]} weight, expected both: the file is incomplete, fetch it again"
            )
    t = {name: tensors[key] for name, key in keys.items() if name not in (*SCALARS, "residual_size")}
    for name, tensor in t.items():
        if algorithm == "lora" and name in ("down", "up", "mid") and tensor.dim() not in (2, 4):
            raise UserError(f"got shape {tuple(tensor.shape)} of {keys[name]}, expected a matrix or 2-D kernel")
        if tensor.dim() == 0 or not tensor.numel():
            raise UserError(f"got shape {tuple(tensor.shape)} of {keys[name]}, expected a vector, matrix or 2-D kernel")
    scalars = {name: _scalar(tensors[keys[name]], keys[name]) for name in SCALARS if name in keys}
    if algorithm == "ia3":
        gain = t.pop("gain").flatten() if "gain" in t else t["factors"] - 1
        on_input = scalars.get("on_input", 0) if "factors" not in t else gain.shape[0] == 1
        t = {"gain": gain.reshape(1, -1) if on_input else gain.reshape(-1, 1)}
    if algorithm == "oft" and t["blocks"].dim() == 4:
        algorithm = "boft"
    if "dora_scale" in t:
        t["magnitude"] = (m := t.pop("dora_scale")).reshape((-1, 1) if m.shape[0] != 1 else (1, -1))
    if "magnitude_of_outputs" in t:  # of convolutions (1, o, 1, 1)
        t["magnitude"] = t.pop("magnitude_of_outputs").reshape(-1, 1)
    entry = LoRAEntry(target, t, scalars.get("alpha"), algorithm, keys)
    if algorithm == "lokr" and {"w1", "w2"} <= t.keys():
        entry = replace(entry, alpha=None)  # of a Kronecker product without low-rank factors it means nothing
    if "scale" in scalars:  # takes the place of alpha / rank
        return replace(entry, alpha=scalars["scale"] * entry.rank)
    of_peft = first.startswith(PEFT_PREFIX) or ".lora_A" in keys.get("down", "")
    if "alpha" in scalars or not (of_peft or (embedded and first.startswith(DIFFUSERS_PREFIXES))):
        return entry
    return replace(entry, alpha=_peft_alpha(entry, first, embedded or beside))


def _scalar(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1:
        raise UserError(f"got shape {tuple(tensor.shape)} of {key}, expected one number: the file is damaged")
    return float(tensor.reshape(()))


def _embedded_config(metadata: Mapping[str, str]) -> dict:
    """The LoraConfig that diffusers writes into the metadata."""
    config = parse_json(metadata.get("lora_adapter_metadata", "{}"), "metadata `lora_adapter_metadata`")
    if not isinstance(config, dict):
        raise UserError("got damaged metadata `lora_adapter_metadata`, expected a JSON object: fetch the file again")
    return config


def _peft_alpha(entry: LoRAEntry, key: str, config: Mapping[str, Any]) -> float | None:
    """What a PEFT configuration says of one layer, as a plain alpha; rank-stabilised LoRA divides by sqrt(rank).

    diffusers puts the configs of several networks into one, as `unet.lora_alpha` or `text_encoder.lora_alpha`. LoKr of
    PEFT is scaled even where nothing is low-rank, by a rank that only the configuration knows.
    """
    stem, prefix = split_ending(key)[0].removeprefix(PEFT_PREFIX), key.split(".")[0] + "."

    def setting(name: str, *other: str) -> Any:
        return next((config[n] for base in (name, *other) for n in (prefix + base, base) if n in config), None)

    def number(name: str, *other: str, pattern: str) -> float | None:
        value = setting(name, *other)
        patterns = setting(pattern) or {}
        if not isinstance(patterns, Mapping):
            raise UserError(f"got {pattern} {patterns!r}, expected a mapping of layers in the LoRA's configuration")
        for layer, own in patterns.items():
            if _matches(str(layer), stem):
                value = own
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise UserError(f"got {name} {value!r} in the LoRA's configuration, expected a number")
        return None if value is None else float(value)

    alpha = number("lora_alpha", "alpha", pattern="alpha_pattern")
    if alpha is None:
        return None
    rank = float(entry.rank)
    if entry.algorithm == "lokr" and {"w1", "w2"} <= entry.tensors.keys():
        rank = number("r", pattern="rank_pattern") or 1.0
    return alpha / (math.sqrt(rank) if setting("use_rslora") else rank) * entry.rank


def _matches(pattern: str, stem: str) -> bool:
    """Whether a pattern of a PEFT configuration, a regular expression, matches the end of a layer's path."""
    if len(pattern) > 500 or re.search(r"[)\]][*+{]", pattern):  # could take for ever on a name that is made for it
        raise UserError(f"got the pattern {pattern[:80]!r} in the LoRA's configuration, expected a layer's name")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", stem) is not None
    except (re.error, RecursionError, OverflowError):
        raise UserError(
            f"got the pattern {pattern[:80]!r} in the LoRA's configuration, expected a layer's name"
        ) from None


def _kind(entries: list[LoRAEntry]) -> str:
    if all("_motion_modules_" in entry.target for entry in entries):
        return "motion-lora"
    official = re.compile(r"(down_blocks|mid_block|up_blocks)\..*attentions\..*\.processor\.to_\w+_lora\.")
    if all(official.match(key) for entry in entries for key in entry.keys.values()):
        return "domain-adapter"
    return "lora"
