"""Every kind of file is named for what it is."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from animatediff.checkpoints.file_kinds import KINDS
from animatediff.checkpoints.files import write_state_dict
from animatediff.checkpoints.identify import identify, identify_tensors, refusal
from animatediff.checkpoints.keymaps import LDM_UNET, LDM_VAE, motion_to_diffusers
from animatediff.config.networks import SDXL_TURBO, ScheduleConfig, distilled_schedule
from animatediff.utils import UserError
from tests import sdxl
from tests.checkpoints.synthetic import (
    ldm_tensors,
    lora_tensors,
    motion_tensors,
    sparsectrl_tensors,
    with_positional,
)
from tests.control import TABLES as CONTROL_TABLES

PATH = Path("x.safetensors")


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {key.replace("__", "."): torch.empty(shape, device="meta") for key, shape in shapes.items()}


def sdxl_motion(frames: int = 32) -> dict[str, Tensor]:
    name = "down_blocks.{}.motion_modules.0.temporal_transformer.norm.bias"
    tensors = {name.format(i): torch.empty(width, device="meta") for i, width in enumerate((320, 640, 1280))}
    up = "up_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"
    return tensors | ({up: torch.empty(1, frames, 1280, device="meta")} if frames else {})


def context(width: int) -> dict[str, Tensor]:
    return {
        f"{LDM_UNET}input_blocks.0.0.weight": torch.empty(320, 4, 3, 3, device="meta"),
        f"{LDM_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(320, width, device="meta"),
    }


def renamed(tensors: dict[str, Tensor], rule) -> dict[str, Tensor]:
    return {rule(key): tensor for key, tensor in tensors.items()}


def sdxl_with(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return sdxl.checkpoint() | {LDM_UNET + name: torch.empty(shape, device="meta")}


def without(part: str) -> dict[str, Tensor]:
    return {key: t for key, t in sdxl.checkpoint().items() if part not in key}


PEFT = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 32)}
TI = {"string_to_param.*": torch.zeros(2, 768)}

CASES: dict[str, tuple[str, object]] = {
    "ldm": ("sd1-checkpoint", ldm_tensors),
    "ldm without text": ("sd1-checkpoint", lambda: context(768)),
    "motion": ("motion-module", lambda: motion_tensors("v3")),
    "whole video unet": ("motion-module", lambda: motion_tensors("v3") | zeros(conv_in__weight=(32, 4, 3, 3))),
    "adapter": ("motion-adapter", lambda: renamed(motion_tensors("v2"), motion_to_diffusers)),
    "motion lora": ("motion-lora", lambda: lora_tensors("motion_lora")),
    "motion lora kohya": (
        "motion-lora",
        lambda: {"lora_unet_down_blocks_0_motion_modules_0_x_to_q.lora_down.weight": torch.zeros(4, 32)},
    ),
    "motion lora diffusers": (
        "motion-lora",
        lambda: renamed(lora_tensors("motion_lora"), lambda key: "unet." + motion_to_diffusers(key)),
    ),
    "domain adapter": ("domain-adapter", lambda: lora_tensors("domain_adapter")),
    "kohya": ("lora", lambda: lora_tensors("kohya_lora")),
    "peft": ("lora", lambda: PEFT),
    "sdxl lora": ("sdxl-lora", lambda: zeros(lora_te2_x__lora_down__weight=(4, 1280))),
    "sdxl lora by width": (
        "sdxl-lora",
        lambda: {"lora_unet_mid_block_x_attn2_to_k.lora_down.weight": torch.empty(4, 2048, device="meta")},
    ),
    "sd2 lora": (
        "sd2-lora",
        lambda: {"lora_unet_mid_block_x_attn2_to_k.lora_down.weight": torch.empty(4, 1024, device="meta")},
    ),
    "toy data set's encoder": ("image-encoder", lambda: zeros(image_encoder__0__weight=(32, 3, 4, 4))),
    "hellomeme": ("hellomeme", lambda: zeros(reference_modules_down__0__x__weight=(4, 4))),
    "flux lora": ("unsupported-lora", lambda: zeros(transformer__blocks__lora_A__weight=(4, 4))),
    "ltx video lora": (
        "unsupported-lora",
        lambda: zeros(diffusion_model__transformer_blocks__0__attn1__to_q__lora_A__weight=(4, 4)),
    ),
    "z-image lora": (
        "unsupported-lora",
        lambda: zeros(diffusion_model__layers__0__attention__to_q__lora_A__weight=(4, 4)),
    ),
    "lumina lora": ("unsupported-lora", lambda: zeros(lora_unet_layers_0_attention_qkv__lora_down__weight=(4, 4))),
    "loha": ("lora", lambda: zeros(lora_unet_conv_in__hada_w1_a=(4, 4))),
    "lokr": ("lora", lambda: zeros(lora_unet_conv_in__lokr_w1=(4, 4))),
    "scribble": ("sparsectrl", lambda: sparsectrl_tensors("scribble")),
    "rgb": ("sparsectrl", lambda: sparsectrl_tensors("rgb")),
    "controlnet": ("controlnet", lambda: zeros(control_model__input_hint_block__0__weight=(16, 3, 3, 3))),
    "controlnet diffusers": ("controlnet", lambda: zeros(controlnet_cond_embedding__conv_in__weight=(16, 3, 3, 3))),
    "ip adapter": ("ip-adapter", lambda: zeros(image_proj__proj__weight=(4, 4), ip_adapter__1__to_k_ip__weight=(4, 4))),
    "instantid": (
        "instantid",
        lambda: {
            "image_proj.proj_in.weight": torch.empty(1280, 512, device="meta"),
            "ip_adapter.1.to_k_ip.weight": torch.empty(640, 2048, device="meta"),
        },
    ),
    "pulid": ("pulid", lambda: zeros(id_adapter_attn_layers__1__id_to_k__weight=(640, 2048))),
    "pulid as an ip-adapter": (
        "pulid",
        lambda: zeros(image_proj__mapping_0__0__weight=(4, 4), ip_adapter__1__to_k_ip__weight=(640, 2048)),
    ),
    "photomaker": (
        "photomaker",
        lambda: zeros(
            id_encoder__visual_projection_2__weight=(1280, 1024),
            lora_weights__unet__down_blocks__1__attentions__0__x__to_q_lora__down__weight=(4, 640),
        ),
    ),
    "kolors ip-adapter": (
        "kolors-ip-adapter",
        lambda: zeros(image_proj__proj_in__weight=(2048, 1024), ip_adapter__1__to_k_ip__weight=(640, 2048)),
    ),
    "kolors": ("kolors", lambda: zeros(encoder_hid_proj__weight=(2048, 4096), add_embedding__linear_1__weight=(1, 1))),
    "guided lcm": (
        "guided-lcm",
        lambda: zeros(time_embedding__cond_proj__weight=(320, 256), add_embedding__linear_1__weight=(1, 1)),
    ),
    "motionctrl": ("motionctrl", lambda: motion_tensors("v3") | zeros(x__cc_projection__weight=(320, 332))),
    "fancyvideo": ("fancyvideo", lambda: motion_tensors("v3") | zeros(fps_embedding__linear__weight=(4, 4))),
    "embedding": ("textual-inversion", lambda: zeros(emb_params=(2, 768))),
    "embedding a1111": ("textual-inversion", lambda: TI),
    "embedding diffusers": ("textual-inversion", lambda: {"<cat>": torch.zeros(768)}),
    "embedding by width": ("textual-inversion", lambda: zeros(cat=(768,))),
    "embedding sd2": ("sd2-textual-inversion", lambda: zeros(emb_params=(2, 1024))),
    "embedding sdxl": ("sdxl-textual-inversion", lambda: zeros(clip_l=(2, 768), clip_g=(2, 1280))),
    "hotshot": ("motion-module", lambda: zeros(down_blocks__0__temporal_attentions__0__norm__weight=(320,))),
    "pia": ("pia", lambda: motion_tensors("v3") | zeros(conv_in__weight=(320, 9, 3, 3))),
    "i2v": ("animatelcm-i2v", lambda: motion_tensors("v2") | zeros(img_encoder__conv_in__weight=(320, 4, 1, 1))),
    "cameractrl": ("cameractrl", lambda: zeros(pose_encoder_state_dict__encoder_conv_in__weight=(320, 6, 3, 3))),
    "cameractrl of SVD": (
        "cameractrl-svd",
        lambda: zeros(down_blocks__0__temporal_transformer_blocks__0__attn1__processor__qkv_merge__weight=(4, 4)),
    ),
    "SVD": (
        "other-video-model",
        lambda: zeros(down_blocks__0__resnets__0__spatial_res_block__time_emb_proj__weight=(4, 4)),
    ),
    "sdxl motion": ("motion-module", sdxl_motion),
    "sdxl": ("sdxl-checkpoint", lambda: context(2048) | zeros(conditioner__embedders__0__x=(1,))),
    "sd2": ("sd2-checkpoint", lambda: context(1024)),
    "inpainting": (
        "inpainting",
        lambda: context(768) | {f"{LDM_UNET}input_blocks.0.0.weight": torch.empty(320, 9, 3, 3, device="meta")},
    ),
    "sdxl inpainting": ("inpainting", lambda: sdxl_with("input_blocks.0.0.weight", (32, 9, 3, 3))),
    "playground": ("playground", lambda: sdxl.checkpoint() | zeros(edm_mean=(1, 4, 1, 1))),
    "koala": ("thinned-sdxl", lambda: without("middle_block.1.")),
    "ssd-1b": ("thinned-sdxl", lambda: without("output_blocks.0.1.transformer_blocks.2.")),
    "ssd-1b as a folder's unet": (
        "thinned-sdxl",
        lambda: zeros(
            add_embedding__linear_1__weight=(1, 1),
            down_blocks__1__attentions__0__transformer_blocks__3__norm1__bias=(4,),
            mid_block__attentions__0__transformer_blocks__3__norm1__bias=(4,),
            up_blocks__0__attentions__0__transformer_blocks__9__norm1__bias=(4,),
        ),
    ),
    "whole sdxl": ("sdxl-checkpoint", sdxl.checkpoint),
    "refiner": ("sdxl-checkpoint", sdxl.refiner),
    "sdxl unet": ("sdxl-unet", lambda: zeros(add_embedding__linear_1__weight=(1, 1))),
    "flux": ("dit-checkpoint", lambda: zeros(double_blocks__0__img_attn__qkv__weight=(4, 4))),
    "diffusers unet": ("sd1-unet", lambda: zeros(down_blocks__0__resnets__0__time_emb_proj__weight=(320, 1280))),
    "vae": ("vae", lambda: zeros(decoder__conv_in__weight=(512, 4, 3, 3))),
    "ldm vae": ("vae", lambda: {f"{LDM_VAE}encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}),
    "text encoder": ("text-encoder", lambda: zeros(text_model__embeddings__token_embedding__weight=(49408, 768))),
    "rife": ("rife", lambda: zeros(block0__conv0__0__0__weight=(96, 7, 3, 3))),
    "taesd": ("tiny-decoder", lambda: {"3.conv.0.weight": torch.empty(64, 64, 3, 3, device="meta")}),
    "nothing known": ("unknown", lambda: zeros(layers__0__weight=(3, 3))),
}

# Files around ControlNet and IP-Adapter by a few of their keys (tests/golden/control) -> kinds.
CONTROL_KINDS = {
    "controlnet (original file of v1.0: whole SD inside)": "controlnet",
    "controlnet (bare)": "controlnet",
    "controlnet (diffusers)": "controlnet",
    "controlnet as difference to the base": "controlnet",
    "control-lora": "control-lora",
    "sdxl controlnet (original)": "sdxl-controlnet",
    "sdxl controlnet (diffusers)": "sdxl-controlnet",
    "sdxl controlnet union": "union-controlnet",
    "controlnet for SD 2.x": "sd2-controlnet",
    "t2i-adapter (original)": "t2i-adapter",
    "t2i-adapter (diffusers)": "t2i-adapter",
    "t2i-adapter light": "t2i-adapter",
    "t2i style adapter": "t2i-adapter",
    "controlllite": "controlllite",
    "ip-adapter vit-G": "ip-adapter",
    "ip-adapter faceid": "faceid",
    "ip-adapter faceid plus": "faceid",
    "ip-adapter faceid portrait": "faceid",
    "sdxl ip-adapter": "sdxl-ip-adapter",
    "sdxl ip-adapter plus": "sdxl-ip-adapter",
    "ip-adapter as its training script saves it": "ip-adapter",
    "ip-adapter as accelerate saves it in safetensors": "ip-adapter",
    "clip vision (OpenCLIP)": "image-encoder",
}
CASES |= {
    name: (CONTROL_KINDS[name], lambda keys=keys: {k: torch.empty(s, device="meta") for k, s in keys.items()})
    for name, keys in CONTROL_TABLES["recognise"].items()
}


@pytest.mark.parametrize("name", CASES)
def test_kinds(name):
    kind, build = CASES[name]
    assert identify_tensors(build(), path=PATH).kind == kind


def test_every_kind_is_covered():
    assert {kind for kind, _ in CASES.values()} == KINDS.keys() - {"diffusers-folder"}


@pytest.mark.parametrize(("layout", "frames", "version"), [("v1", 24, "v1"), ("v3", 32, "v3"), ("v2", 32, "v2")])
def test_motion_versions_by_their_positional_encoding(layout, frames, version):
    info = identify_tensors(with_positional(motion_tensors(layout), frames), path=PATH)
    assert (info.version, info.positional_length) == (version, frames)
    assert info.config_line == f"motion_module: {PATH}"


@pytest.mark.parametrize(("frames", "version"), [(32, "sdxl-beta"), (24, "hotshot-xl"), (0, None)])
def test_sdxl_motion_modules_by_their_positional_encoding(frames, version):
    info = identify_tensors(sdxl_motion(frames) | zeros(up_blocks__0__motion_modules__0__x=(1,)), path=PATH)
    assert (info.version, info.base) == (version, "SDXL")
    assert info.needs == "an SDXL image model"
    assert ("version: hotshot-xl or sdxl-beta" in info.config_line) == (version is None)


@pytest.mark.parametrize("version", ["sdxl-beta", "hotshot-xl"])
def test_small_sdxl_motion_modules_are_told_by_their_levels(version):
    info = identify_tensors(sdxl.motion(version), path=PATH)
    assert (info.kind, info.version, info.base) == ("motion-module", version, "SDXL")


def test_an_undecided_version_is_asked_for():
    info = identify_tensors(motion_tensors("v3"), path=PATH)
    assert info.version is None and "version: v1 or v3" in info.config_line
    assert identify_tensors(motion_tensors("v3"), {"version": "v1"}, path=PATH).version == "v1"


@pytest.mark.parametrize(("length", "version"), [(24, "v1"), (32, None), (None, None)])
def test_the_length_in_a_diffusers_adapter_proves_only_v1(length, version):
    adapter = renamed(motion_tensors("v3"), motion_to_diffusers)
    assert identify_tensors(adapter, path=PATH, length=length).version == version


def test_variants_are_told_apart():
    assert identify_tensors(sparsectrl_tensors("rgb"), path=PATH).version == "rgb"
    assert identify_tensors(sparsectrl_tensors("scribble"), path=PATH).version == "scribble"
    assert identify_tensors(CASES["loha"][1](), path=PATH).version == "loha"
    assert identify_tensors(CASES["lokr"][1](), path=PATH).version == "lokr"


def test_the_base_is_named_by_family_and_widths():
    assert identify_tensors(sdxl_motion(), path=PATH).base == "SDXL"
    assert identify_tensors(context(1024), path=PATH).base == "SD 2.x"
    for case in ("ltx video lora", "SVD", "playground", "flux", "nothing known"):
        assert identify_tensors(CASES[case][1](), path=PATH).base == "not told by the file"
    for tensors in (ldm_tensors(), motion_tensors("v3"), renamed(motion_tensors("v3"), motion_to_diffusers)):
        assert identify_tensors(tensors, path=PATH).base == "SD 1.x layout of widths 32, 64, 64, 96"
    official = {
        f"down_blocks.{i}.motion_modules.0.temporal_transformer.norm.bias": torch.empty(width, device="meta")
        for i, width in enumerate((320, 640, 1280, 1280))
    }
    assert identify_tensors(official, path=PATH).base == "SD 1.x"


def test_counts_and_types(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
    info = identify(write_state_dict(tmp_path / "x.safetensors", tensors, metadata={"k": "v"}))
    assert (info.num_tensors, info.num_parameters, info.dtype) == (2, 10, "float16, float32")
    assert info.metadata["k"] == "v"
    assert not info.supported and "cannot be used" in info.config_line


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("motion lora", r"this is a MotionLoRA, not a motion module: use it as `motion_module_lora_configs: \[{path"),
        ("sdxl", "this is an SDXL image model .*, not a motion module: use it as `pretrained_model_path: x"),
        ("ldm", "this is an SD 1.x image model in one file, not a motion module: use it as `dreambooth_path: x"),
        ("vae", "this is a VAE alone, not a motion module: use it as `vae_path: x"),
        ("nothing known", "this is no kind of file that is known here, not a motion module: its keys"),
    ],
)
def test_refusals_say_what_it_is_and_where_it_belongs(case, message):
    info = identify_tensors(CASES[case][1](), path=PATH)
    assert re.search(message, str(refusal(info, "a motion module")))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json, no unet/ and no weights"):
        identify(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="a FluxPipeline without unet/ weights"):
        identify(tmp_path)


@pytest.mark.parametrize(
    ("case", "name", "expected"),
    [
        ("sdxl", "sd_xl_turbo_1.0_fp16", ("SDXL-Turbo", "euler_ancestral", 4)),
        ("sdxl", "sdxl_lightning_8step", ("SDXL-Lightning of 8 steps", "euler", 8)),
        ("sdxl", "Hyper-SDXL-1step-Unet", ("Hyper-SD of 1 step", "lcm", 1)),
        ("sdxl", "juggernautXL_LCM", ("a latent consistency model", "lcm", 4)),
        ("sdxl", "turboVisionXL", None),
        ("sdxl lora", "sdxl_lightning_4step_lora", ("SDXL-Lightning of 4 steps", "euler", 4)),
        ("sdxl lora", "Hyper-SDXL-12steps-CFG-lora", ("Hyper-SD of 12 steps", "ddim", 12)),
        ("sdxl lora", "lcm-lora-sdxl/pytorch_lora_weights", ("a latent consistency model", "lcm", 4)),
        ("kohya", "sd_xl_turbo_lora_v1", None),  # of SD 1.x, whatever it is called
        ("kohya", "Hyper-SD15-8steps-lora", ("Hyper-SD of 8 steps", "ddim", 8)),
        ("kohya", "AnimateLCM_sd15_t2v_lora", ("a latent consistency model", "lcm", 4)),
        ("kohya", "welcome_lcmx", None),
        ("kohya", "realisticVisionLCM_v1", ("a latent consistency model", "lcm", 4)),
        (
            "kohya",
            "models--latent-consistency--lcm-lora-sdv1-5/snapshots/8b1a/pytorch_lora_weights",
            ("a latent consistency model", "lcm", 4),
        ),
        ("motion", "models--lcm--motion/snapshots/8b1a/diffusion_pytorch_model", None),
        (
            "motion",
            "models--wangfuyun--AnimateLCM/snapshots/8b1a/diffusion_pytorch_model",
            ("AnimateLCM", "lcm", 6),
        ),
        ("vae", "sdxl_lightning_8step", None),
    ],
)
def test_distilled_models_are_told_by_their_names(case, name, expected):
    needs = identify_tensors(CASES[case][1](), path=Path(f"{name}.safetensors")).distillation
    assert (needs and (needs.name, needs.sampler, needs.steps)) == expected


def test_what_else_the_names_of_distilled_models_tell():
    guided, one, sample = (
        identify_tensors(CASES["sdxl"][1](), path=Path(f"{name}.safetensors")).distillation
        for name in ("Hyper-SDXL-8steps-CFG", "Hyper-SDXL-1step-Unet", "sdxl_lightning_1step_x0")
    )
    assert (guided.guidance_scale, guided.max_guidance_scale) == (5.0, 8.0)
    assert (one.timesteps, one.possible_steps) == ((800.0,), (1,))
    assert distilled_schedule(ScheduleConfig(), sample).prediction_type == "sample"
    for phases, sampling in ((1, ("lcm", "lcm", 4)), (5, ("ddim", "trailing", 5))):
        told = {"consistency": json.dumps({"timesteps": 20, "phases": phases})}
        needs = identify_tensors(CASES["kohya"][1](), told, path=PATH).distillation
        assert (needs.sampler, needs.timestep_spacing, needs.steps) == sampling
        if phases == 1:
            assert distilled_schedule(ScheduleConfig(), needs).lcm_timesteps == 20
    for damaged in ("", "{", "[]", '{"timesteps": 0, "phases": 1}', '{"timesteps": 1e999, "phases": 1}'):
        assert identify_tensors(CASES["kohya"][1](), {"consistency": damaged}, path=PATH).distillation is None


@pytest.mark.parametrize("change", [{}, {"steps": 0}, {"sampler": 1}, {"possible_steps": []}, {"timesteps": "x"}])
def test_a_file_may_say_itself_how_it_was_distilled(change):
    told = {"distillation": json.dumps(asdict(SDXL_TURBO) | change)}
    info = identify_tensors(CASES["motion"][1](), told, path=PATH)
    if not change:
        assert info.distillation == SDXL_TURBO
    else:
        with pytest.raises(UserError, match="x.safetensors: .*metadata `distillation`"):
            assert info.distillation
