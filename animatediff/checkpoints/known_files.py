"""Where weight files are looked for, and where those that people know by name are published."""

from __future__ import annotations

from pathlib import Path

import animatediff

REPOSITORY = Path(animatediff.__file__).resolve().parents[1]

MOTION_FILES = "https://huggingface.co/guoyww/animatediff"
IMAGE_MODELS = "https://huggingface.co/guoyww/animatediff_t2i_backups"
ANIMATE_LCM_FILES = "https://huggingface.co/wangfuyun/AnimateLCM"
ANIMATE_LCM_I2V_FILES = "https://huggingface.co/wangfuyun/AnimateLCM-I2V"
CONTROLNETS = "https://huggingface.co/lllyasviel/ControlNet-v1-1"
SDXL_CONTROLNETS = "https://huggingface.co/diffusers/controlnet"
IP_ADAPTERS = "https://huggingface.co/h94/IP-Adapter"
LIGHTNING_FILES = "https://huggingface.co/ByteDance/AnimateDiff-Lightning"
SDXL = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"
HOTSHOT = "https://huggingface.co/hotshotco/Hotshot-XL"
SDXL_512 = "https://huggingface.co/hotshotco/SDXL-512"
SDXL_REFINER = "https://huggingface.co/stabilityai/stable-diffusion-xl-refiner-1.0"
SDXL_TURBO = "https://huggingface.co/stabilityai/sdxl-turbo"
SDXL_LIGHTNING = "https://huggingface.co/ByteDance/SDXL-Lightning"
HYPER_SD = "https://huggingface.co/ByteDance/Hyper-SD"
LCM_LORAS = "https://huggingface.co/latent-consistency"
SD15 = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
VAES = "https://huggingface.co/stabilityai/sd-vae-ft-mse"
# where a file of this name is published
SOURCES = {
    **dict.fromkeys(("mm_sd_v14.ckpt", "mm_sd_v15.ckpt", "mm_sd_v15_v2.ckpt", "v3_sd15_mm.ckpt"), MOTION_FILES),
    **dict.fromkeys(("v3_sd15_adapter.ckpt", "mm_sdxl_v10_beta.ckpt"), MOTION_FILES),
    **dict.fromkeys(("sd_xl_base_1.0.safetensors", "stable-diffusion-xl-base-1.0"), SDXL),
    **dict.fromkeys((f"hsxl_temporal_layers{half}.safetensors" for half in ("", ".f16")), HOTSHOT),
    **dict.fromkeys((f"hsxl_base_1.0{half}.safetensors" for half in ("", ".f16")), SDXL_512),
    **dict.fromkeys(("v3_sd15_sparsectrl_rgb.ckpt", "v3_sd15_sparsectrl_scribble.ckpt"), MOTION_FILES),
    **{
        f"v2_lora_{move}.ckpt": MOTION_FILES
        for move in (
            *("ZoomIn", "ZoomOut", "PanLeft", "PanRight"),
            *("TiltUp", "TiltDown", "RollingClockwise", "RollingAnticlockwise"),
        )
    },
    **dict.fromkeys(
        (
            "realisticVisionV60B1_v51VAE.safetensors",
            "majicmixRealistic_v4.safetensors",
            "majicmixRealistic_v5Preview.safetensors",
            "leosamsFilmgirlUltra_velvia20Lora.safetensors",
            "leosamsHelloworldXL_filmGrain20.safetensors",
            "toonyou_beta3.safetensors",
            "rcnzCartoon3d_v10.safetensors",
            "lyriel_v16.safetensors",
            "TUSUN.safetensors",
        ),
        IMAGE_MODELS,
    ),
    **dict.fromkeys(("AnimateLCM_sd15_t2v.ckpt", "AnimateLCM_sd15_t2v_lora.safetensors"), ANIMATE_LCM_FILES),
    **dict.fromkeys(("AnimateLCM_sd15_i2v.ckpt", "AnimateLCM_sd15_i2v_lora.safetensors"), ANIMATE_LCM_I2V_FILES),
    **{
        f"control_{name}.pth": CONTROLNETS
        for name in (
            *("v11p_sd15_canny", "v11p_sd15_scribble", "v11p_sd15_lineart", "v11p_sd15s2_lineart_anime"),
            *("v11p_sd15_softedge", "v11f1p_sd15_depth", "v11p_sd15_normalbae", "v11p_sd15_openpose"),
            *("v11p_sd15_seg", "v11p_sd15_mlsd", "v11p_sd15_inpaint", "v11f1e_sd15_tile", "v11e_sd15_ip2p"),
            "v11e_sd15_shuffle",
        )
    },
    **{
        f"ip-adapter{name}_sd15{end}": IP_ADAPTERS
        for name in ("", "-plus", "-plus-face", "-full-face")
        for end in (".safetensors", ".bin")
    },
    **dict.fromkeys(("ip-adapter_sd15_light.safetensors", "image_encoder", "ip-adapter_sdxl.safetensors"), IP_ADAPTERS),
    **{f"ip-adapter{name}_sdxl_vit-h.safetensors": IP_ADAPTERS for name in ("", "-plus", "-plus-face")},
    **{f"controlnet-{kind}-sdxl-1.0": f"{SDXL_CONTROLNETS}-{kind}-sdxl-1.0" for kind in ("canny", "depth")},
    "PIA-condition-adapter": "https://huggingface.co/openmmlab/PIA-condition-adapter",
    "CameraCtrl.ckpt": "https://huggingface.co/hehao13/CameraCtrl",
    **{f"animatediff_lightning_{n}step_comfyui.safetensors": LIGHTNING_FILES for n in (1, 2, 4, 8)},
    **dict.fromkeys((f"sd_xl_turbo_1.0{half}.safetensors" for half in ("", "_fp16")), SDXL_TURBO),
    "sd_xl_refiner_1.0.safetensors": SDXL_REFINER,
    **{
        f"sdxl_lightning_{n}step{what}.safetensors": SDXL_LIGHTNING
        for n in (2, 4, 8)
        for what in ("", "_unet", "_lora")
    },
    **{
        f"Hyper-{base}-{steps}-lora.safetensors": HYPER_SD
        for base in ("SDXL", "SD15")
        for steps in ("1step", "2steps", "4steps", "8steps", "8steps-CFG", "12steps-CFG")
    },
    **{name: f"{LCM_LORAS}/{name}" for name in ("lcm-lora-sdv1-5", "lcm-lora-sdxl")},
    **dict.fromkeys((f"vae-ft-mse-840000-ema-pruned.{end}" for end in ("safetensors", "ckpt")), f"{VAES}-original"),
    "sd-vae-ft-mse": VAES,
    "stable-diffusion-v1-5": SD15,
    "v1-5-pruned-emaonly.safetensors": SD15,
    "v1-5-pruned.safetensors": SD15,
}


def find_file(path: str) -> Path | None:
    """An existing file or folder: as given (from the current folder), or from the repository's root."""
    candidates = (Path(path).expanduser(), REPOSITORY / path)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def missing_file(path: str) -> str:
    """The message for a file that is not there: where it was looked for, and where it can be had."""
    searched = Path.cwd() / path if Path.cwd() == REPOSITORY else f"{Path.cwd() / path} and {REPOSITORY / path}"
    searched = path if Path(path).is_absolute() else searched
    line = f"there is no {path} (searched: {searched})"
    if source := SOURCES.get(Path(path).name):
        return f"{line}; download it from {source} and put it there: nothing is downloaded for you"
    return f"{line}; check the path, or put the file there"
