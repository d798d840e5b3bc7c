"""Keyword arguments of the pipeline's call, for editors. Made by `python -m animatediff.config.help`."""

from __future__ import annotations

from typing import Any, TypedDict


class CallOptions(TypedDict, total=False):
    """Every option of a request, flat or as a group."""

    pretrained_model_path: str
    dreambooth_path: str
    vae_path: str
    vae: str
    motion_module: str
    version: Any
    max_frames: int
    norm_over_frames: bool
    lora_model_path: Any
    lora_alpha: float
    lora_alpha_rule: Any
    motion_module_lora_configs: Any
    adapter_lora_path: str
    adapter_lora_scale: float
    domain_lora_scale: float
    embeddings: Any
    inference_config: str
    prompt_map: Any
    n_prompt: Any
    head_prompt: str
    tail_prompt: str
    prompt_weighting: bool
    clip_skip: int
    prompt_interpolation: Any
    prompt_loop: Any
    prompt_fixed_ratio: float
    L: int
    video_length: int
    H: int
    W: int
    steps: Any
    cfg_scale: Any
    sampler: Any
    scheduler: Any
    timestep_spacing: Any
    timesteps: Any
    seed: Any
    random_seed: Any
    window_schedule: Any
    window_length: int
    context_length: int
    window_overlap: Any
    context_overlap: Any
    window_fuse: Any
    window_stride: int
    context_stride: int
    video: Any
    image: Any
    last_image: Any
    mask: Any
    strength: Any
    inversion: bool
    inversion_prompt: str
    extend: int
    image_ramp: float
    video_start: int
    video_stride: int
    controlnet_path: str
    controlnet_config: str
    controlnet_images: Any
    conditioning_frames: Any
    controlnet_image_indexs: Any
    controlnet_frame_indices: Any
    controlnet_scale: Any
    controlnet_conditioning_scale: Any
    normalize_condition_images: bool
    controlnet: Any
    ip_adapter: Any
    image_encoder: str
    motion_scale: Any
    motion_mask: str
    pe_stretch: float
    guidance_schedule: Any
    guidance_rescale: float
    pag_scale: float
    pag_layers: Any
    lora_schedule: Any
    motion_lora_schedule: Any
    noise_type: Any
    name: str
    fps: float
    format: Any
    loop_count: int
    model: Any
    prompts: Any
    travel: Any
    size: Any
    sampling: Any
    windows: Any
    inputs: Any
    sparsectrl: Any
    controlnets: Any
    ip_adapters: Any
    pia: Any
    i2v: Any
    camera: Any
    motion: Any
    guidance: Any
    pag: Any
    freeu: Any
    freeinit: Any
    loras: Any
    noise: Any
    loop: Any
    output: Any
    callback_on_step_end_tensor_inputs: list[str]
    cross_attention_kwargs: dict[str, float]
    sigmas: Any
