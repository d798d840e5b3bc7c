"""The config.json files of diffusers folders, to and from the metadata vocabulary of sizes.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from animatediff.checkpoints.files import read_json
from animatediff.config.networks import MotionConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.utils import UserError, naming

Json = dict[str, Any]
# Settings that change what a network computes, and the values that ours computes; the first is diffusers' default.
FIXED: dict[str, dict[str, tuple]] = {
    "unet": {
        "act_fn": ("silu", "swish"),
        "norm_eps": (1e-5,),
        "freq_shift": (0,),
        "flip_sin_to_cos": (True,),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1, None),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "only_cross_attention": (False,),
        "dual_cross_attention": (False,),
        "attention_type": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    },
    "vae": {
        "act_fn": ("silu", "swish"),
        "mid_block_add_attention": (True,),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    "text_encoder": {"layer_norm_eps": (1e-5,)},
    "text_encoder_2": {"layer_norm_eps": (1e-5,)},
    "scheduler": {"num_train_timesteps": (1000,)},
}

EMPTY: Json = {}

# Names of the weight files without suffix, safetensors and pickle.
UNET_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_STEMS = ("model", "pytorch_model")
DIFFUSERS_VERSION = "0.30.0"  # the release whose grammar is written


def image_metadata(
    *,
    unet: Json = EMPTY,
    vae: Json = EMPTY,
    text_encoder: Json = EMPTY,
    text_encoder_2: Json = EMPTY,
    scheduler: Json = EMPTY,
) -> dict[str, str]:
    """What the keys of an image model cannot tell, from the config.json of its parts.

    Raises:
        UserError: heads differ between levels neither as their widths do nor not at all.
    """
    found = heads_in(unet) | {
        "norm_num_groups": unet.get("norm_num_groups"),
        "vae_norm_num_groups": vae.get("norm_num_groups"),
        "vae_scaling_factor": vae.get("scaling_factor"),
        "prediction_type": scheduler.get("prediction_type"),
        "beta_schedule": scheduler.get("beta_schedule"),
        "timestep_spacing": scheduler.get("timestep_spacing"),
        "rescale_betas_zero_snr": scheduler.get("rescale_betas_zero_snr"),
    }
    for name, config in (("text", text_encoder), ("text_2", text_encoder_2)):
        found |= {
            f"{name}_num_heads": config.get("num_attention_heads"),
            f"{name}_activation": config.get("hidden_act"),
        }
    return {name: _text(value) for name, value in found.items() if value is not None}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def folder_metadata(folder: Path) -> dict[str, str]:
    """`image_metadata` of a whole diffusers folder.

    Raises:
        UserError: a config.json is broken, or asks for another network than ours.
    """
    parts = [part for part in FIXED if part != "scheduler"]
    files = {part: folder / part / "config.json" for part in parts}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    configs = {part: checked_json(part, path) for part, path in files.items()}
    unet = configs["unet"]
    if os.path.lexists(files["unet"]) and not ("attention_head_dim" in unet or "num_attention_heads" in unet):
        raise UserError(f"got {files['unet']} without attention_head_dim, expected it: fetch the file again")
    with naming(folder):
        return image_metadata(**configs)


def optional_json(path: Path) -> Json:
    """A config.json, empty where there is none. One that is there has to be good."""
    return read_json(path) if os.path.lexists(path) else {}


def checked_json(part: str, path: Path) -> Json:
    """As `optional_json`, of a network's own config.json. Args and Raises as of `check_config`."""
    config = optional_json(path)
    check_config(part, config, path)
    return config


def check_config(part: str, config: Json, path: Path) -> None:
    """Refuse settings of a config.json that another network would be needed for.

    Args:
        part: which network it is of, a key of FIXED.

    Raises:
        UserError: a setting is not what this network computes.
    """
    for name, fixed in FIXED[part].items():
        value = config.get(name, fixed[0])
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in fixed):
            expected = " or ".join(str(known).lower() if isinstance(known, bool) else str(known) for known in fixed)
            raise UserError(f"{path}: got {name} {value!r}, expected {expected}: this network has no other")


def heads_in(unet: Json) -> Json:
    """`num_heads` or `head_dim`. `attention_head_dim` is the NUMBER of heads in these files."""
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim")
    if not isinstance(heads, list):
        return {"num_heads": heads}
    widths = unet.get("block_out_channels", [])
    if len(heads) and heads == heads[:1] * len(heads):
        return {"num_heads": heads[0]}
    if not isinstance(widths, list) or not all(type(number) is int and number > 0 for number in (*widths, *heads)):
        raise UserError(f"got heads {heads} and widths {widths} in the UNet's config.json, expected whole numbers")
    dims = {width / number for width, number in zip(widths, heads, strict=False)}
    if len(widths) != len(heads) or len(dims) != 1:
        raise UserError(
            f"got a UNet of widths {widths} with {heads} heads, expected one number of heads, or one width of a head, "
            "for all levels: this is no SD 1.x or SDXL model"
        )
    return {"head_dim": int(dims.pop())}


def adapter_metadata(config: Json) -> dict[str, str]:
    """What the keys of a MotionAdapter cannot tell; empty for any other config.json."""
    names = {
        "num_heads": "motion_num_attention_heads",
        "max_frames": "motion_max_seq_length",
        "norm_num_groups": "motion_norm_num_groups",
    }
    return {ours: str(config[theirs]) for ours, theirs in names.items() if config.get(theirs) is not None}


def sparsectrl_metadata(config: Json) -> dict[str, str]:
    """What the keys of a SparseControlNet cannot tell; empty for any other config.json."""
    if config.get("_class_name") != "SparseControlNetModel":
        return {}
    names = {
        "motion_num_heads": "motion_num_attention_heads",
        "max_frames": "motion_max_seq_length",
        "norm_num_groups": "norm_num_groups",
    }
    found = {ours: config.get(theirs) for ours, theirs in names.items()} | heads_in(config)
    return {name: _text(value) for name, value in found.items() if value is not None}


def adapter_frames(config: Json) -> int | None:
    """The longest clip that the config.json of a MotionAdapter names.

    Raises:
        UserError: it is no such number.
    """
    frames = config.get("motion_max_seq_length")
    if frames is not None and (type(frames) is not int or not 0 < frames < 1_000_000):
        raise UserError(f"got motion_max_seq_length {frames!r} in config.json, expected a whole number")
    return frames


def unet_json(config: UNetConfig, *, sample_size: int = 64, time_id_channels: int = 0) -> Json:
    """config.json of a UNet2DConditionModel.

    Args:
        sample_size: latents' height and width; a hint for the default picture size.
        time_id_channels: for SDXL, features of each number of `time_ids`.
    """
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention_levels)]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_id_channels,
        "projection_class_embeddings_input_dim": config.added_channels,
    }
    blocks = config.num_transformer_blocks
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "attention_head_dim": [w // config.head_dim for w in config.block_out_channels]
        if config.head_dim
        else config.num_heads,
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        # a level without attention has 1 in diffusers' own files
        "transformer_layers_per_block": blocks if isinstance(blocks, int) else [max(n, 1) for n in blocks],
        "up_block_types": up,
        "use_linear_projection": config.linear_projection,
        **(added if config.added_channels else {}),
    }


def vae_json(config: VAEConfig, *, sample_size: int = 512) -> Json:
    """config.json of an AutoencoderKL."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_json(config: TextConfig) -> Json:
    """config.json of a CLIPTextModel, or where it has a projection of a CLIPTextModelWithProjection."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection_width else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # of the original release, whose tokenizer has the real ids; transformers expects it
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": config.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 1,
        "projection_dim": config.projection_width or config.width,
        "vocab_size": config.vocab_size,
    }


def scheduler_json(config: ScheduleConfig, *, name: str = "DDIMScheduler") -> Json:
    """scheduler_config.json of a DDIMScheduler, or of another one of that `name`."""
    return {
        "_class_name": name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": config.clip_sample,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "set_alpha_to_one": config.set_alpha_to_one,
        "steps_offset": config.steps_offset,
        "timestep_spacing": config.timestep_spacing,
        "trained_betas": None,
    }


def model_index_json() -> Json:
    """model_index.json of a StableDiffusionPipeline without safety checker."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def sdxl_index_json(*, refiner: bool) -> Json:
    """model_index.json of a StableDiffusionXLPipeline, or of the refiner's, which has the second text encoder alone."""
    return {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": not refiner,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **({"requires_aesthetics_score": True} if refiner else {}),
    }


def adapter_json(config: MotionConfig, *, widths: Mapping[int, int], layers: int, groups: int = 32) -> Json:
    """config.json of a MotionAdapter.

    Args:
        widths: channels by level.
        layers: motion modules per level of the down blocks.
        groups: of the modules' GroupNorm.
    """
    return {
        "_class_name": "MotionAdapter",
        "_diffusers_version": DIFFUSERS_VERSION,
        "block_out_channels": [widths[level] for level in sorted(widths)],
        "conv_in_channels": None,
        "motion_layers_per_block": layers,
        "motion_max_seq_length": config.max_frames,
        "motion_mid_block_layers_per_block": 1,
        "motion_norm_num_groups": groups,
        "motion_num_attention_heads": config.num_heads,
        "motion_transformer_layers_per_block": config.num_transformer_blocks,
        "motion_transformer_layers_per_mid_block": config.num_transformer_blocks,
        "use_motion_mid_block": config.mid_block,
    }
