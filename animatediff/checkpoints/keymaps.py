"""Names of the same tensors in different files. Each table is written once, from our names, and read both ways.

Ours are diffusers' names for image layers and the official AnimateDiff names for motion modules. LDM is the grammar
of Stable Diffusion's single files (Rombach et al. 2022).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from animatediff.utils import UserError

Table = dict[str, str]  # our path of a layer -> its path in the other grammar

# Where a single file keeps its networks.
LDM_UNET = "model.diffusion_model."
LDM_VAE = "first_stage_model."
LDM_TEXT = "cond_stage_model.transformer."
SDXL_TEXT = "conditioner.embedders.0.transformer."
SDXL_TEXT_2 = "conditioner.embedders.1.model."  # OpenCLIP's names
REFINER_TEXT_2 = "conditioner.embedders.0.model."  # the only encoder of SDXL's refiner, SDXL's second
# prefix -> the field of parts.ImageParts
LDM_PARTS = {
    LDM_UNET: "unet",
    LDM_VAE: "vae",
    LDM_TEXT: "text",
    SDXL_TEXT: "text",
    SDXL_TEXT_2: "text_2",
    REFINER_TEXT_2: "text_2",
}

# Entries of LDM files that are no weights of these networks: the schedule, EMA copies, training losses, and the
# embeddings that textual inversion and DreamBooth trainers left in.
LDM_BOOKKEEPING = re.compile(
    r"(betas|logvar|lvlb_weights|scale_factor|global_step"
    r"|(sqrt_|log_)?(recip_|one_minus_)?(recipm1_)?alphas_cumprod(_prev)?|posterior_\w+"
    r"|model_ema\..*|embedding_manager\..*|first_stage_model\.(loss|model_ema)\..*"
    r"|cond_stage_model\.(logit_scale|text_projection(\.weight)?)"
    r"|denoiser\.sigmas|conditioner\.embedders\.\d\.(model\.)?logit_scale)"
)
# Parts of CLIP that the (first) text encoder does not use, below LDM_TEXT or in text_encoder/.
UNUSED_TEXT = re.compile(
    r"(text_model\.)?embeddings\.position_ids|text_projection(\.weight)?|logit_scale|vision_model\..*"
)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# diffusers before 0.18 spelled the VAE's attention like this.
_VAE_ATTENTION_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
VAE_HALVES = ("encoder", "decoder")

# transformers' CLIP -> OpenCLIP: the ends of the text encoder, the parts of a layer. q, k and v are one matrix there.
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")

# Official motion names -> diffusers MotionAdapter names, inside one transformer block.
_MOTION = {
    ".attention_blocks.0.": ".attn1.",
    ".attention_blocks.1.": ".attn2.",
    ".norms.0.": ".norm1.",
    ".norms.1.": ".norm2.",
    ".ff_norm.": ".norm3.",
}
MOTION_MARK = "motion_modules."
HOTSHOT_MARK = "temporal_attentions."
# How the positional encodings of a motion module's file end: official, diffusers', Hotshot-XL's.
POSITIONAL_ENDINGS = (".pos_encoder.pe", ".pos_embed.pe", ".pos_encoder.positional_encoding")


def unet_table(*, layers: int, attention_levels: Sequence[bool]) -> Table:
    """Our UNet layers -> LDM's, without LDM_UNET.

    LDM numbers all layers of one half through: `input_blocks` counts conv_in, every ResNet (with its attention) and
    every downsampler; `output_blocks` every ResNet, the upsampler being the last part of a level's last entry.

    Args:
        layers: ResNets per level on the way down (one more on the way up).
        attention_levels: which levels have attention, highest resolution first.
    """
    levels = len(attention_levels)
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for i in range(layers):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{first + i}.0"
            table[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{first + i}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for block, attention in enumerate(reversed(attention_levels)):
        first, last = block * (layers + 1), block * (layers + 1) + layers
        for i in range(layers + 1):
            blocks[f"up_blocks.{block}.resnets.{i}"] = f"output_blocks.{first + i}.0"
            if attention:
                table[f"up_blocks.{block}.attentions.{i}"] = f"output_blocks.{first + i}.1"
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if attention else 1}.conv"
    return table | {f"{ours}.{a}": f"{ldm}.{b}" for ours, ldm in blocks.items() for a, b in _RESNET.items()}


def with_unet_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet alone in LDM's names, as ComfyUI has it, under LDM_UNET; all other state dicts as they are."""
    own = r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."
    if not any(re.match(r"output_blocks\.\d+\.1\.transformer_blocks\.", key) for key in tensors):
        return tensors
    return {LDM_UNET + key if re.match(own, key) else key: tensor for key, tensor in tensors.items()}


def unet_layout(ldm_keys: Iterable[str]) -> tuple[int, tuple[bool, ...]]:
    """`layers` and `attention_levels` of `unet_table`, read from LDM keys (without LDM_UNET).

    Raises:
        UserError: more layers than there are entries.
    """
    found = [m for key in ldm_keys if (m := re.match(r"input_blocks\.([0-9]{1,6})\.([01])\.(\w+)", key))]
    numbers = {int(m[1]) for m in found}
    downsamplers = sorted({int(m[1]) for m in found if m[3] == "op"})
    layers = downsamplers[0] - 1 if downsamplers else max(numbers, default=0)
    levels = len(downsamplers) + 1
    if layers < 0 or layers * levels > len(numbers):
        raise UserError(
            f"got a UNet of {levels} levels with {layers} layers each, expected them all: parts are missing"
        )
    with_attention = {int(m[1]) for m in found if m[2] == "1"}
    return layers, tuple(1 + i * (layers + 1) in with_attention for i in range(levels))


def vae_table(*, levels: int, layers: int) -> Table:
    """Our VAE layers -> LDM's, without LDM_VAE; the decoder's levels count from the image there.

    Args:
        levels: resolutions.
        layers: ResNets per level of the encoder (one more in the decoder).
    """
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks = {}
    for half in VAE_HALVES:
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        blocks |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
        for ours, ldm in _VAE_ATTENTION.items():
            table[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{ldm}"
    for level in range(levels):
        up = levels - 1 - level
        blocks |= {f"encoder.down_blocks.{level}.resnets.{i}": f"encoder.down.{level}.block.{i}" for i in range(layers)}
        blocks |= {f"decoder.up_blocks.{level}.resnets.{i}": f"decoder.up.{up}.block.{i}" for i in range(layers + 1)}
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    for ours, ldm in blocks.items():
        table |= {f"{ours}.{name}": f"{ldm}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
        table[f"{ours}.conv_shortcut"] = f"{ldm}.nin_shortcut"
    return table


def vae_layout(ldm_keys: Iterable[str]) -> tuple[int, int]:
    """`levels` and `layers` of `vae_table`, read from LDM keys (without LDM_VAE).

    Raises:
        UserError: more layers than there are entries.
    """
    found = [m for key in ldm_keys if (m := re.match(r"encoder\.down\.([0-9]{1,6})\.block\.([0-9]{1,6})\.", key))]
    levels = 1 + max((int(m[1]) for m in found), default=-1)
    layers = 1 + max((int(m[2]) for m in found if m[1] == "0"), default=-1)
    if levels * layers > len(found):
        raise UserError(f"got a VAE of {levels} levels with {layers} layers each, expected them all: parts are missing")
    return levels, layers


def vae_attention_spellings() -> Table:
    """Every other spelling of the VAE's attention layers seen in files, diffusers' or LDM's -> ours."""
    spellings = {}
    for half in VAE_HALVES:
        ours, ldm = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        for name in _VAE_ATTENTION:
            spellings[f"{ldm}.{name}"] = f"{ours}.{name}"
        for name, old in _VAE_ATTENTION_OLD.items():
            spellings |= {f"{ours}.{old}": f"{ours}.{name}", f"{ldm}.{old}": f"{ours}.{name}"}
    return spellings


def text_from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's text encoder in transformers' names, without what is no weight of it (`logit_scale`).

    `text_projection` is multiplied from the right there and from the left here: the square matrix is transposed.
    """
    ends, parts = inverted(_OPEN_CLIP), inverted(_OPEN_CLIP_LAYER)
    out = {}
    for key, tensor in tensors.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        if key == "text_projection":
            out["text_projection.weight"] = tensor.T.contiguous()
        elif layer:
            path = f"text_model.encoder.layers.{layer[1]}."
            if layer[2] == "attn.in_proj":
                thirds = zip(_QKV, tensor.chunk(3), strict=True)
                out |= {f"{path}self_attn.{name}.{layer[3]}": third for name, third in thirds}
            else:
                out[f"{path}{parts.get(layer[2], layer[2])}.{layer[3]}"] = tensor
        elif key != "logit_scale":
            out[ends.get(key, key)] = tensor
    return out


def text_to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `text_from_open_clip`."""
    out = {}
    for key, tensor in tensors.items():
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        elif not layer:
            out[_OPEN_CLIP.get(key, key)] = tensor
        elif layer[2] == f"self_attn.{_QKV[0]}":
            joined = [tensors[key.replace(_QKV[0], name)] for name in _QKV]
            out[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(joined)
        elif layer[2] in _OPEN_CLIP_LAYER:
            out[f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = tensor
    return out


def inverted(table: Mapping[str, str]) -> Table:
    return {theirs: ours for ours, theirs in table.items()}


def translate(key: str, table: Mapping[str, str]) -> str | None:
    """The key with the longest path that `table` knows replaced, or None where it knows none."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) > 0:
        if key[:end] in table:
            return table[key[:end]] + key[end:]
    return None


def motion_to_diffusers(key: str) -> str:
    """An official motion-module name (or one of its LoRA's) as diffusers' MotionAdapter spells it."""
    key = key.replace(".temporal_transformer.", ".", 1)
    for official, diffusers in _MOTION.items():
        key = key.replace(official, diffusers, 1)
    return key


def is_motion(key: str) -> bool:
    """Whether an entry is a motion module's, in any spelling."""
    return MOTION_MARK in key or HOTSHOT_MARK in key


def motion_to_official(key: str) -> str:
    """A name of diffusers' MotionAdapter or of Hotshot-XL (or one of a LoRA's) as the official files spell it."""
    key = key.replace(HOTSHOT_MARK, MOTION_MARK, 1).replace("pos_encoder.positional_encoding", "pos_encoder.pe")
    for official, diffusers in _MOTION.items():
        key = key.replace(diffusers, official, 1)
    return re.sub(r"(motion_modules\.\d+\.)(?!temporal_transformer\.)", r"\1temporal_transformer.", key, count=1)


def motion_to_hotshot(key: str) -> str:
    """An official motion-module name as Hotshot-XL's own files spell it."""
    key = key.replace(MOTION_MARK, HOTSHOT_MARK, 1).replace(".temporal_transformer.", ".", 1)
    return key.replace("pos_encoder.pe", "pos_encoder.positional_encoding")


def positions_to_diffusers(positional: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positional encodings in diffusers' names, which has one for all attentions of a block."""
    attention = re.compile(r"attention_blocks\.\d+\.pos_encoder\.pe$")
    return {motion_to_diffusers(attention.sub("pos_embed.pe", key)): table for key, table in positional.items()}


def positions_to_official(positional: Mapping[str, Tensor], attentions: int) -> dict[str, Tensor]:
    """Positional encodings in official names, which have one for each of a block's `attentions`."""
    tables = {}
    for key, table in positional.items():
        stem, shared, _ = key.partition("pos_embed.pe")
        names = [f"{stem}attention_blocks.{i}.pos_encoder.pe" for i in range(attentions)] if shared else [key]
        tables |= dict.fromkeys(names, table)
    return tables
