"""The config.json files of diffusers folders, to and from the metadata vocabulary of sizes.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from animatediff.config.networks import MotionConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.utils import UserError

Json = dict[str, Any]
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
    found = _heads(unet) | {
        "norm_num_groups": unet.get("norm_num_groups"),
        "vae_norm_num_groups": vae.get("norm_num_groups"),
        "vae_scaling_factor": vae.get("scaling_factor"),
        "prediction_type": scheduler.get("prediction_type"),
        "beta_schedule": scheduler.get("beta_schedule"),
    }
    for name, config in (("text", text_encoder), ("text_2", text_encoder_2)):
        found |= {
            f"{name}_num_heads": config.get("num_attention_heads"),
            f"{name}_activation": config.get("hidden_act"),
        }
    return {name: str(value) for name, value in found.items() if value is not None}


def _heads(unet: Json) -> Json:
    """`num_heads` or `head_dim`. `attention_head_dim` is the NUMBER of heads in these files."""
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim")
    if not isinstance(heads, list):
        return {"num_heads": heads}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    widths = unet.get("block_out_channels", [])
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
