"""The config.json files of diffusers folders, to and from the metadata vocabulary of sizes.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from animatediff.config.networks import MotionConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.utils import UserError

Json = dict[str, Any]

# Names of the weight files without suffix, safetensors and pickle.
UNET_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_STEMS = ("model", "pytorch_model")
DIFFUSERS_VERSION = "0.30.0"  # the release whose grammar is written


def image_metadata(*, unet: Json, vae: Json, text: Json, scheduler: Json) -> dict[str, str]:
    """What the keys of an image model cannot tell. `attention_head_dim` is the NUMBER of heads there.

    Raises:
        UserError: heads differ between levels, as only SD 2.x and SDXL have them.
    """
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    if isinstance(heads, list):
        if len(set(heads)) != 1:
            raise UserError(
                f"got a UNet with {heads} heads, expected one number for all levels: this is no SD 1.x model"
            )
        heads = heads[0]
    found = {
        "num_heads": heads,
        "norm_num_groups": unet.get("norm_num_groups"),
        "vae_norm_num_groups": vae.get("norm_num_groups"),
        "vae_scaling_factor": vae.get("scaling_factor"),
        "text_num_heads": text.get("num_attention_heads"),
        "text_activation": text.get("hidden_act"),
        "prediction_type": scheduler.get("prediction_type"),
        "beta_schedule": scheduler.get("beta_schedule"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def adapter_metadata(config: Json) -> dict[str, str]:
    """What the keys of a MotionAdapter cannot tell; empty for any other config.json."""
    names = {
        "num_heads": "motion_num_attention_heads",
        "max_frames": "motion_max_seq_length",
        "norm_num_groups": "motion_norm_num_groups",
    }
    return {ours: str(config[theirs]) for ours, theirs in names.items() if config.get(theirs) is not None}


def unet_json(config: UNetConfig, *, sample_size: int = 64) -> Json:
    """config.json of a UNet2DConditionModel."""
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention_levels)]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "attention_head_dim": config.num_heads,
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
        "transformer_layers_per_block": config.num_transformer_blocks,
        "up_block_types": up,
        "use_linear_projection": config.linear_projection,
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
    """config.json of a CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel"],
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
        "projection_dim": config.width,
        "vocab_size": config.vocab_size,
    }


def scheduler_json(config: ScheduleConfig) -> Json:
    """scheduler_config.json of a DDIMScheduler."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": config.clip_sample,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
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
