"""The names in LoRA files: `<prefix><module path><ending>`. Tables only, so that a new dialect is a row.

Dialects, by the name of one tensor:
    kohya, LyCORIS    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, lora_te_text_model_….alpha
    LDM names         lora_unet_input_blocks_1_1_proj_in.lora_down.weight, diffusion_model.input_blocks.1.1.proj_in.…
    LyCORIS, wrapped  lycoris_down_blocks_0_attentions_0_proj_in.lokr_w1
    MotionLoRA        down_blocks.0.motion_modules.0.temporal_transformer.….processor.to_q_lora.down.weight
    domain adapter    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
    diffusers, old    unet.….attn1.processor.to_q_lora.down.weight, text_encoder.….self_attn.to_q_lora.up.weight
    diffusers         unet.….attn1.to_q.lora.down.weight, text_encoder.….q_proj.lora_linear_layer.up.weight
    diffusers, PEFT   unet.….attn1.to_q.lora_A.weight, text_encoder.….q_proj.lora_B.weight
    PEFT              base_model.model.….attn1.to_q.lora_A.weight
MotionLoRA occurs in all diffusers dialects as well, with MotionAdapter names (attn1 for attention_blocks.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from animatediff.checkpoints.keymaps import motion_to_diffusers, translate, unet_table

# Ending -> (algorithm, tensor's name in it), see `models.lora_algorithms`; algorithm None goes with any. A longer
# ending comes before one that it ends with. The first spelling of a name is the one that is written.
ENDINGS: dict[str, tuple[str | None, str]] = {
    **{f".lora_{name}.weight": ("lora", name) for name in ("down", "up", "mid")},
    **{
        f"{place}.{name}.weight": ("lora", name) for name in ("down", "up") for place in (".lora_linear_layer", ".lora")
    },
    **{f"_lora.{name}.weight": ("lora", name) for name in ("down", "up")},
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    **{f".hada_{name}": ("loha", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": ("lokr", name) for name in ("w1_a", "w1_b", "w1", "w2_a", "w2_b", "w2", "t2")},
    **{f".{name}.weight": ("glora", name) for name in ("a1", "a2", "b1", "b2", "bm")},
    ".on_input": ("ia3", "on_input"),
    ".ia3_l": ("ia3", "factors"),  # PEFT's: multiplied, 1 changes nothing
    ".diff": ("full", "weight"),
    ".w_norm": ("full", "weight"),
    ".diff_b": (None, "bias"),
    ".b_norm": (None, "bias"),
    ".oft_blocks": ("oft", "blocks"),
    ".rescale": (None, "rescale"),
    ".dora_scale": (None, "dora_scale"),
    ".lora_magnitude_vector": (None, "magnitude_of_outputs"),
    ".bias_indices": (None, "residual_indices"),
    ".bias_values": (None, "residual_values"),
    ".bias_size": (None, "residual_size"),
    **{f"{place}.alpha": (None, "alpha") for place in (".lora_linear_layer", ".lora", "_lora", "")},
    ".scale": (None, "scale"),
}
GAIN_ENDING = ".weight"  # of (IA)3, which only the `.on_input` beside it tells from any other weight
_ENDINGS = tuple(ENDINGS)  # in this order
ADAPTER_NAME = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|ia3_l))\.(?!weight$)[^.]+(\.weight)?$")

# Prefix -> network: "unet", "text" or, of SDXL, "text2". Some write a dot where others write `_`.
PREFIXES: dict[str, str] = {
    **{f"{name}_unet{dot}": "unet" for name in ("lora", "oft") for dot in "_."},
    **{f"{name}_te{dot}": "text" for name in ("lora", "oft") for dot in "_."},
    **{f"lora_te{n}{dot}": network for n, network in ((1, "text"), (2, "text2")) for dot in "_."},
    "lycoris_": "unet",
    "unet.": "unet",
    "text_encoder.": "text",
    "text_encoder_2.": "text2",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text",
    "text_encoders.clip_g.transformer.": "text2",
}
PEFT_PREFIX = "base_model.model."
EMBEDDING_PREFIX = "bundle_emb."  # of textual inversions that LyCORIS packs into a LoRA's file

LORA_STEMS = ("pytorch_lora_weights", "adapter_model")  # of the files in folders of diffusers and of PEFT

# LDM's numbering of the UNet's layers -> ours, at two layers a level as in SD 1.x, 2.x and XL, whichever levels have
# attention. All separators are dots: in kohya's names nothing tells the `_` of a name from that of a path.
LDM_PATHS = {
    ldm.replace("_", "."): ours
    for attention in (True, False)
    for ours, ldm in unet_table(layers=2, attention_levels=4 * [attention]).items()
} | {"label.emb.0.0": "add_embedding.linear_1", "label.emb.0.2": "add_embedding.linear_2"}
TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
UNET_PATH = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|(time|add)_embedding)(_|$)")

# Names of ours that have a `_` in them, to find the dots of a path that has none.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "conv_norm_out", "conv_shortcut", "proj_in"),
    *("proj_out", "time_embedding", "time_emb_proj", "linear_1", "linear_2", "transformer_blocks", "to_q", "to_k"),
    *("to_v", "to_out", "motion_modules", "temporal_transformer", "attention_blocks", "ff_norm", "add_embedding"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1", "layer_norm2"),
    *("final_layer_norm", "text_projection", "token_embedding", "position_embedding"),
)
_STEPS = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)) + "|[^_]+")

# A pattern some key matches -> what such a file is. None of these is a change of layers that an image UNet has.
UNSUPPORTED = {
    r"\.oft_diag$": "an OFT adapter of a LyCORIS preview, which holds the rotations themselves",
    r"\.(lambda_layer|[qp]_layer\.weight)": "a T-LoRA, whose rank depends on the timestep",
    r"\.b?oft_[RS]\b|\.boft_[rs]\b": "an OFT adapter in PEFT's own parametrisation",
    r"\.vera_lambda_": "a VeRA adapter",
    r"\.hra_u\b": "an HRA adapter",
    r"\.lora_E\b": "an AdaLoRA adapter",
    r"^(ip_adapter|image_proj)\.|\.to_[kv]_ip\.": "an IP-Adapter",
    r"^lllite_": "a ControlNet-LLLite",
    r"temporal_transformer_blocks|temp_attentions|temp_convs": "a LoRA for another video model (SVD or ModelScope)",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]": "a LoRA for a video transformer (Wan or the like)",
    r"(single_transformer|double|single|joint)_blocks|^transformer[._]|^lora_transformer_": (
        "a LoRA for a diffusion transformer (Flux, SD 3, HunyuanVideo or the like)"
    ),
}
SDXL_KEY = re.compile(
    r"^lora_te2[._]|^text_encoder_2\.|(add_embedding|label_emb)[._]|attentions[._]\d[._]transformer_blocks[._]9[._]"
    r"|(put_blocks[._]\d|middle_block)[._]1[._]transformer_blocks[._]9[._]"
)


def split_ending(key: str) -> tuple[str, str | None, str]:
    """A key as (stem, algorithm, tensor's name); the name is empty where no ending is known."""
    key = ADAPTER_NAME.sub(r"\1\2", key)
    key = key.removesuffix(".weight") if key.endswith("_vector.weight") else key
    if not key.endswith(_ENDINGS):
        return key, None, ""
    ending = next(e for e in _ENDINGS if key.endswith(e))
    return key.removesuffix(ending), *ENDINGS[ending]


def target_of(stem: str) -> str | None:
    """The network and the layer's path in our names, `_` for `.`; None where it names no such network."""
    stem = stem.removeprefix(PEFT_PREFIX)
    prefix = max((p for p in PREFIXES if stem.startswith(p)), key=len, default="")
    path = stem.removeprefix(prefix).replace(".", "_")
    network = PREFIXES.get(prefix)
    if network is None and UNET_PATH.match(path):
        network = "unet"
    elif network is None and path.startswith("text_model_"):
        network = "text"
    path = path.replace("_processor_", "_")
    if network == "unet":
        path = _motion_names(_ldm_names(path))
        return "unet." + re.sub(r"_to_out$", "_to_out_0", path) if UNET_PATH.match(path) else None
    if network is not None:
        path = re.sub(r"(?<=self_attn_)to_(q|k|v|out)$", lambda m: TEXT_NAMES[m[0]], path)
        return f"{network}." + (path if path.startswith(("text_model_", "text_projection")) else f"text_model_{path}")
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


def unsupported_lora(keys: Iterable[str]) -> str | None:
    """What a file is that cannot be applied, or None."""
    keys = list(keys)
    for pattern, what in UNSUPPORTED.items():
        found = re.compile(pattern).search
        if any(found(key) for key in keys):
            return what
    return None


def lora_base(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str | None:
    """The family of image models that a LoRA was made for, where its keys, widths or kohya's metadata tell."""
    if any(map(SDXL_KEY.search, tensors)):
        return "SDXL"
    for key, tensor in tensors.items():
        if re.search(r"attn2[._](processor\.)?to_[kv][._].*(down|lora_A)", key) and tensor.dim() >= 2:
            if known := {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}.get(tensor.shape[1]):
                return known
    told = re.match(r"sdxl|sd_v2|sd_v1|", (metadata or {}).get("ss_base_model_version", ""))[0]
    return {"sdxl": "SDXL", "sd_v2": "SD 2.x", "sd_v1": "SD 1.x"}.get(told)


def lora_targets(keys: Iterable[str]) -> set[str]:
    """Every layer of our networks that a file changes as a LoRA does; none in a file of any other kind."""
    parts = [split_ending(key) for key in keys]
    return {target for stem, algorithm, _ in parts if algorithm and (target := target_of(stem))}


def lora_algorithms(keys: Iterable[str]) -> set[str]:
    """What kinds of change a LoRA's file holds, as people call them."""
    names = {algorithm for _, algorithm, _ in map(split_ending, keys) if algorithm}
    return names | ({"dora"} if any("dora_scale" in key or "magnitude_vector" in key for key in keys) else set())


def path_of(target: str) -> str:
    """The dotted path of a target's layer: `down_blocks.0.attentions.0.proj_in`."""
    return ".".join(_STEPS.findall(target.partition(".")[2]))


def lora_keys(
    kind: str,
    network: str,
    path: str,
    *,
    algorithm: str = "lora",
    names: Iterable[str] = ("down", "up", "alpha"),
    sdxl: bool = False,
) -> dict[str, str]:
    """What the tensors of one layer are called in a file, by their names in `models.lora_algorithms`.

    Args:
        kind: "lora" is kohya's and LyCORIS' dialect; "motion-lora" and "domain-adapter" are AnimateDiff's, plain LoRAs
            without alpha; "diffusers" is its PEFT dialect.
        network: "unet", "text" or "text2".
        path: of the layer in the network, in our names.
        sdxl: whether the network has two text encoders, which kohya's dialect numbers.
    """
    if kind == "lora":
        prefixes = {"unet": "lora_unet_", "text": f"lora_te{'1' * sdxl}_", "text2": "lora_te2_"}
        stem = prefixes[network] + path.replace(".", "_")
        written = {(a or algorithm, name): ending for ending, (a, name) in reversed(ENDINGS.items())}
        written |= {(algorithm, "alpha"): ".alpha", (algorithm, "magnitude"): ".dora_scale"}
        return {name: stem + written[algorithm, name] for name in names}
    if kind == "diffusers":
        prefix = {"unet": "unet.", "text": "text_encoder.", "text2": "text_encoder_2."}[network]
        stem = prefix + motion_to_diffusers(path)
        return {"down": f"{stem}.lora_A.weight", "up": f"{stem}.lora_B.weight"}
    attention, layer = path.removesuffix(".0").rsplit(".", 1)  # to_out.0 is to_out there
    stem = f"{attention}.processor.{layer}_lora"
    return {"down": f"{stem}.down.weight", "up": f"{stem}.up.weight"}
