"""LoRA files of every dialect, read into one description (`animatediff.models.lora.LoRA`).

Dialects, by the name of one tensor:
    kohya             lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, lora_te_text_model_….alpha
    kohya, LDM names  lora_unet_input_blocks_1_1_proj_in.lora_down.weight
    LoCon             the same for 3x3 convolutions, also with .lora_mid.weight
    MotionLoRA        down_blocks.0.motion_modules.0.temporal_transformer.….processor.to_q_lora.down.weight
    domain adapter    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
    diffusers, old    unet.….attn1.processor.to_q_lora.down.weight, text_encoder.….self_attn.to_q_lora.up.weight
    diffusers         unet.….attn1.to_q.lora.down.weight, text_encoder.….q_proj.lora_linear_layer.up.weight
    diffusers, PEFT   unet.….attn1.to_q.lora_A.weight, text_encoder.….q_proj.lora_B.weight
MotionLoRA occurs in all diffusers dialects as well, with MotionAdapter names (attn1 for attention_blocks.0).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from animatediff.checkpoints.files import read_json, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify_tensors, refusal
from animatediff.checkpoints.keymaps import translate, unet_table
from animatediff.models.lora import LoRA
from animatediff.models.lora_layers import LoRAEntry
from animatediff.utils import UserError

# How a tensor's name ends -> its role. A longer ending comes before one that it ends with.
ROLES = {
    f"{ending}.weight": role
    for role, endings in {
        "down": (".lora_down", ".lora_A", ".lora_A.default", ".lora_linear_layer.down", ".lora.down", "_lora.down"),
        "up": (".lora_up", ".lora_B", ".lora_B.default", ".lora_linear_layer.up", ".lora.up", "_lora.up"),
        "mid": (".lora_mid",),
    }.items()
    for ending in endings
} | {".lora_linear_layer.alpha": "alpha", ".lora.alpha": "alpha", "_lora.alpha": "alpha", ".alpha": "alpha"}

NETWORKS = {"lora_unet_": "unet", "unet.": "unet", "lora_te1_": "text", "lora_te_": "text", "text_encoder.": "text"}

# A pattern some key matches -> what such a file is. None of these can be applied to SD 1.x as a plain LoRA.
STRANGERS = {
    r"\.hada_w\d": "a LyCORIS LoHa",
    r"\.lokr_[wt]\d": "a LyCORIS LoKr",
    r"\.dora_scale$|lora_magnitude_vector": "a DoRA (weight-decomposed LoRA)",
    r"\.oft_(blocks|diag)$": "an OFT adapter",
    r"\.on_input$": "an (IA)3 adapter",
    r"\.[ab]1\.weight$": "a LyCORIS GLoRA",
    r"^(ip_adapter|image_proj)\.|\.to_[kv]_ip\.": "an IP-Adapter",
    r"^lllite_": "a ControlNet-LLLite",
    r"(single_transformer|double|single|joint)_blocks": "a LoRA for a diffusion transformer (Flux, SD 3 or the like)",
    r"^lora_te2_|^text_encoder_2\.|(add_embedding|label_emb)[._]|attentions[._]\d[._]transformer_blocks[._]9[._]"
    r"|(put_blocks[._]\d|middle_block)[._]1[._]transformer_blocks[._]9[._]": "an SDXL LoRA",
}

# LDM's numbering of the UNet's layers -> ours, at two layers a level as in SD 1.x, whichever levels have attention.
# All separators are dots: in kohya's names nothing tells the `_` of a name from that of a path.
LDM_PATHS = {
    ldm.replace("_", "."): ours
    for attention in (True, False)
    for ours, ldm in unet_table(layers=2, attention_levels=4 * [attention]).items()
}
TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read_lora(path: str | Path, *, name: str | None = None) -> LoRA:
    """Read a LoRA of any dialect; which network it fits is found out when it is attached.

    alpha comes from the file's own `.alpha` tensors, or from the PEFT configuration that diffusers keeps in the
    safetensors metadata and PEFT in `adapter_config.json` beside the file. MotionLoRA and domain adapter have none
    (dW = scale * up @ down). AnimateLCM's companion LoRA is trained with alpha 8 at rank 64, i.e. 1/8: as a kohya
    file with its alphas it needs nothing special; from a copy without them, use an eighth of the scale.

    Args:
        path: .safetensors, .ckpt, .pt or .bin.
        name: what to call it in reports and scales; the file's stem by default.

    Raises:
        UserError: the file is something else (LoHa, LoKr, DoRA, SDXL, IP-Adapter, …; named), or is incomplete.
    """
    path = Path(path)
    file = read_state_dict(path)
    info = identify_tensors(file.tensors, file.metadata, path=path)
    if not re.search("lora|lycoris|domain-adapter|unknown", info.kind):
        raise refusal(info, "a LoRA")
    config = path.with_name("adapter_config.json")
    try:
        return parse_lora(
            file.tensors,
            name=name or path.stem,
            metadata=file.metadata,
            peft_config=read_json(config) if config.is_file() else None,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_lora(
    tensors: dict[str, Tensor],
    *,
    name: str,
    metadata: dict[str, str] | None = None,
    peft_config: dict | None = None,
) -> LoRA:
    """Turn a LoRA's state dict into a `LoRA`.

    Args:
        tensors: key -> tensor, in any dialect.
        name: what to call it.
        metadata: the file's, kept as it is; kohya's `ss_base_model_version` tells SD 2.x and SDXL.
        peft_config: the LoraConfig of a PEFT file (lora_A, lora_B) whose metadata has none.

    Raises:
        UserError: see `read_lora`.
    """
    metadata = metadata or {}
    if what := _stranger(tensors, metadata):
        raise UserError(f"this is {what}, expected a LoRA for SD 1.x: use a plain LoRA or LoCon made for SD 1.x")
    groups: dict[str, dict[str, str]] = {}  # target -> role -> key
    unread = []
    for key in tensors:
        stem, role = _split_role(key)
        target = _target(stem) if role else None
        if role is None or target is None:
            unread.append(key)
        elif role in groups.setdefault(target, {}):
            raise UserError(f"got both {groups[target][role]} and {key} for one layer, expected one: remove either")
        else:
            groups[target][role] = key
    peft_config = _embedded_config(metadata) or peft_config or {}
    entries = tuple(_entry(target, keys, tensors, peft_config) for target, keys in groups.items())
    if not entries:
        raise UserError(
            f"got no LoRA weights for a UNet or text encoder of SD 1.x (keys such as {', '.join(list(tensors)[:2])}), "
            "expected pairs like lora_down and lora_up: choose another file"
        )
    return LoRA(name, _kind(entries), entries, metadata, tuple(unread))


def lora_keys(kind: str, network: str, path: str) -> tuple[str, ...]:
    """What the tensors of one layer are called: down, up and, in a plain LoRA, alpha.

    Args:
        kind: "lora" is kohya's dialect, "motion-lora" and "domain-adapter" are AnimateDiff's, which has no alpha.
        network: "unet" or "text".
        path: of the layer in the network, in our names.
    """
    if kind == "lora":
        stem = {"unet": "lora_unet_", "text": "lora_te_"}[network] + path.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
    attention, layer = path.removesuffix(".0").rsplit(".", 1)  # to_out.0 is to_out there
    stem = f"{attention}.processor.{layer}_lora"
    return f"{stem}.down.weight", f"{stem}.up.weight"


def write_lora(lora: LoRA, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a LoRA under its entries' own `keys` (see `lora_keys`); `read_lora` reads it back.

    Raises:
        UserError: the suffix or the folder is unusable.
    """
    tensors = {}
    for entry in lora.entries:
        alpha = [] if entry.alpha is None else [torch.tensor(entry.alpha)]
        for key, tensor in zip(entry.keys, [entry.tensors["down"], entry.tensors["up"], *alpha], strict=True):
            tensors[key] = tensor.detach().to(dtype or tensor.dtype)
    return write_state_dict(path, tensors, metadata=lora.metadata)


def _stranger(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str | None:
    for pattern, what in STRANGERS.items():
        found = re.compile(pattern)
        if any(found.search(key) for key in tensors):
            return what
    for key, tensor in tensors.items():
        if re.search(r"attn2.to_[kv][._].*(down|lora_A)", key) and tensor.dim() >= 2 and tensor.shape[1] == 2048:
            return "an SDXL LoRA (its text context is 2048 wide)"
    base = metadata.get("ss_base_model_version", "")
    return {"sdxl": "an SDXL LoRA", "sd_v2": "an SD 2.x LoRA"}.get(re.match(r"sdxl|sd_v2|", base)[0])


def _split_role(key: str) -> tuple[str, str | None]:
    for ending, role in ROLES.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, None


def _target(stem: str) -> str | None:
    """`unet.` or `text.` and the layer's path in our names, `_` for `.`; None where it names no such network."""
    stem = stem.removeprefix("base_model.model.")  # PEFT's own files
    prefix = next((p for p in NETWORKS if stem.startswith(p)), "")
    path = stem.removeprefix(prefix).replace(".", "_")
    network = NETWORKS.get(prefix)
    if network is None and re.match(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)", path):
        network = "unet"
    elif network is None and path.startswith("text_model_"):
        network = "text"
    path = path.replace("_processor_", "_")
    if network == "unet":
        path = _motion_names(_ldm_names(path))
        return "unet." + re.sub(r"_to_out$", "_to_out_0", path)
    if network == "text":
        path = re.sub(r"(?<=self_attn_)to_(q|k|v|out)$", lambda m: TEXT_NAMES[m[0]], path)
        return "text." + (path if path.startswith("text_model_") else f"text_model_{path}")
    return None


def _ldm_names(path: str) -> str:
    """LDM names of UNet layers -> ours; other paths as they are."""
    ours = translate(path.replace("_", ".") + ".", LDM_PATHS)
    return ours.rstrip(".").replace(".", "_") if ours else path


def _motion_names(path: str) -> str:
    """MotionAdapter names inside a motion module -> official ones; other paths as they are."""
    head, marker, tail = path.partition("_motion_modules_")
    if not marker:
        return path
    tail = re.sub(r"^(\d+)_(?!temporal_transformer_)", r"\1_temporal_transformer_", tail)
    tail = re.sub(r"_attn([12])_", lambda m: f"_attention_blocks_{int(m[1]) - 1}_", tail)
    return head + marker + tail


def _entry(target: str, keys: dict[str, str], tensors: dict[str, Tensor], peft_config: dict) -> LoRAEntry:
    if missing := {"down", "up"} - keys.keys():
        raise UserError(
            f"got {next(iter(keys.values()))} without its {missing.pop()} weight, expected both: "
            "the file is incomplete, fetch it again"
        )
    weights = {role: tensors[key] for role, key in keys.items() if role != "alpha"}
    for role, weight in weights.items():
        if weight.dim() not in (2, 4) or not weight.numel():
            raise UserError(f"got shape {tuple(weight.shape)} of {keys[role]}, expected a matrix or 2-D kernel")
    alpha = None
    if "alpha" in keys:
        alpha = float(tensors[keys["alpha"]].reshape(-1)[0])
    elif ".lora_A." in keys["down"]:
        alpha = _peft_alpha(keys["down"], weights["down"].shape[0], peft_config)
    return LoRAEntry(target, weights, alpha, keys=tuple(keys.values()))


def _embedded_config(metadata: dict[str, str]) -> dict:
    """The LoraConfig that diffusers writes into the metadata."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError("got damaged metadata `lora_adapter_metadata`, expected a JSON object: fetch the file again")
    return config


def _peft_alpha(key: str, rank: int, config: dict) -> float | None:
    """What a LoraConfig says of one layer, as a plain alpha: rank-stabilised LoRA divides by sqrt(rank) instead.

    diffusers puts the configs of several networks into one, as `unet.lora_alpha` or `text_encoder.lora_alpha`.
    """
    stem, prefix = _split_role(key)[0].removeprefix("base_model.model."), key.split(".")[0] + "."

    def setting(name: str):
        return config.get(prefix + name, config.get(name))

    alpha = setting("lora_alpha")
    for layer, value in (setting("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({layer})", stem):
            alpha = value
    if alpha is None:
        return None
    return float(alpha) * math.sqrt(rank) if setting("use_rslora") else float(alpha)


def _kind(entries: tuple[LoRAEntry, ...]) -> str:
    if all("_motion_modules_" in entry.target for entry in entries):
        return "motion-lora"
    official = re.compile(r"(down_blocks|mid_block|up_blocks)\..*attentions\..*\.processor\.to_\w+_lora\.")
    if all(official.match(key) for entry in entries for key in entry.keys):
        return "domain-adapter"
    return "lora"
