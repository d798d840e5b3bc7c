"""scripts/convert.py takes every family that has two spellings to the other one and back, bit by bit."""

import shutil

import pytest
import torch

from animatediff.checkpoints.files import read_json, read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.keymaps import LDM_VAE, MOTION_MARK
from animatediff.checkpoints.sparsectrl_files import save_sparsectrl
from animatediff.config.networks import MotionConfig
from animatediff.models.sparsectrl_encoder import build_sparsectrl
from animatediff.models.unet import UNet
from animatediff.utils import UserError
from scripts import convert
from tests import sdxl
from tests.checkpoints.synthetic import (
    equal,
    ldm_tensors,
    lora_tensors,
    motion_tensors,
    sparsectrl_tensors,
    with_positional,
    write,
)
from tests.checkpoints.test_ip_adapter_files import accelerate, training_script
from tests.checkpoints.test_sparsectrl_files import SMALL, diffusers_names
from tests.control import clip_vision_tensors, controlnet_tensors, ip_adapter_tensors, write_image_encoder
from tests.families import cameractrl_tensors


def with_positions(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    motion = {key: t for key, t in tensors.items() if MOTION_MARK in key}
    return tensors | with_positional(motion, 32)


def vae() -> dict[str, torch.Tensor]:
    return {key.removeprefix(LDM_VAE): t for key, t in ldm_tensors().items() if key.startswith(LDM_VAE)}


TRIPS = {  # the file, there, a key that has to be there, and back
    "sparsectrl rgb": (
        lambda: with_positions(sparsectrl_tensors("rgb")),
        ("diffusers-sparsectrl", "folder", "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"),
        "sparsectrl",
    ),
    "sparsectrl scribble": (
        lambda: sparsectrl_tensors("scribble"),
        ("diffusers-sparsectrl", "folder", "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight"),
        "sparsectrl",
    ),
    **{
        f"ip-adapter {variant}": (
            lambda variant=variant: ip_adapter_tensors(variant),
            ("ip-adapter", "x.bin", "ip_adapter.1.to_k_ip.weight"),
            "ip-adapter",
        )
        for variant in ("base", "plus", "full")
    },
    "vae": (vae, ("diffusers-vae", "folder", "encoder.mid_block.attentions.0.to_q.weight"), "vae"),
    "cameractrl": (
        cameractrl_tensors,
        ("cameractrl", "x.ckpt", "pose_encoder_state_dict.encoder_conv_in.weight"),
        "cameractrl",
    ),
    "hotshot-xl": (
        lambda: sdxl.motion("hotshot-xl"),
        ("official-motion", "x.safetensors", "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
        "hotshot-motion",
    ),
    "animatelcm": (
        lambda: motion_tensors("v2"),  # without positional encodings, as AnimateLCM's
        ("diffusers-motion", "folder", "down_blocks.0.motion_modules.0.norm.weight"),
        "official-motion",
    ),
    "textual inversion": (
        lambda: {"emb_params": torch.randn(2, 768)},
        ("diffusers-embedding", "x.safetensors", "<a>"),
        "embedding",
    ),
    "motion lora": (
        lambda: lora_tensors("motion_lora"),
        (
            "diffusers-lora",
            "x.safetensors",
            "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        ),
        "official-lora",
    ),
    "domain adapter": (
        lambda: lora_tensors("domain_adapter"),
        (
            "diffusers-lora",
            "x.safetensors",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        ),
        "official-lora",
    ),
}


def converted(monkeypatch, source, target, to):
    monkeypatch.setattr("sys.argv", ["convert.py", str(source), str(target), "--to", to])
    convert.main()
    return target


@pytest.mark.parametrize("name", TRIPS)
def test_there_and_back(tmp_path, monkeypatch, name):
    build, (to, target, key), back = TRIPS[name]
    tensors = {k: t.half() if i % 2 and "pe" not in k else t for i, (k, t) in enumerate(build().items())}
    source = write(tmp_path / "a.safetensors", tensors)
    there = converted(monkeypatch, source, tmp_path / target, to)
    weights = there / "diffusion_pytorch_model.safetensors" if target == "folder" else there
    assert key in read_state_dict(weights).tensors
    again = converted(monkeypatch, there, tmp_path / "b.safetensors", back)
    assert equal(read_state_dict(again).tensors, tensors)
    assert identify(again).kind == identify(source).kind


def test_an_image_encoder_goes_to_open_clip_and_back(tmp_path, monkeypatch):
    folder = write_image_encoder(tmp_path / "a")
    one = converted(monkeypatch, folder, tmp_path / "b.safetensors", "open-clip")
    assert read_state_dict(one).tensors["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (144, 48)
    assert identify(one).kind == "image-encoder"
    shutil.copy(folder / "config.json", tmp_path)  # a width that no published encoder has
    back = converted(monkeypatch, one, tmp_path / "c", "image-encoder")
    assert equal(read_state_dict(back / "model.safetensors").tensors, clip_vision_tensors())
    told, wanted = read_json(back / "config.json"), read_json(folder / "config.json")
    assert {key: told[key] for key in wanted.keys() & told.keys()} == {key: wanted[key] for key in wanted.keys() & told}


@pytest.mark.parametrize("spelling", [training_script, accelerate])
def test_an_ip_adapter_of_a_training_becomes_a_released_one(tmp_path, monkeypatch, spelling):
    trained = write(tmp_path / "a.safetensors", spelling(ip_adapter_tensors("plus")))
    released = torch.load(converted(monkeypatch, trained, tmp_path / "b.bin", "ip-adapter"))
    assert list(released) == ["image_proj", "ip_adapter"]  # what diffusers' loader insists on
    flat = {f"{group}.{key}": t for group, tensors in released.items() for key, t in tensors.items()}
    assert equal(flat, ip_adapter_tensors("plus"))


def test_a_checkpoint_of_cameractrl_is_the_official_one(tmp_path, monkeypatch):
    flat = write(tmp_path / "a.safetensors", cameractrl_tensors())
    official = torch.load(converted(monkeypatch, flat, tmp_path / "b.ckpt", "cameractrl"))
    assert set(official) == {"pose_encoder_state_dict", "attention_processor_state_dict"}
    assert all("qkv_merge" in key for key in official["attention_processor_state_dict"])


def test_the_sparsectrl_folder_is_as_diffusers_reads_it(tmp_path, monkeypatch):
    source = write(tmp_path / "a.safetensors", with_positions(sparsectrl_tensors("scribble")))
    folder = converted(monkeypatch, source, tmp_path / "folder", "diffusers-sparsectrl")
    config = read_json(folder / "config.json")
    assert config["_class_name"] == "SparseControlNetModel"
    assert config["down_block_types"] == 3 * ["CrossAttnDownBlockMotion"] + ["DownBlockMotion"]
    assert (config["conditioning_channels"], config["use_simplified_condition_embedding"]) == (3, False)
    assert (config["attention_head_dim"], config["motion_num_attention_heads"]) == (8, 8)
    tensors = read_state_dict(folder / "diffusion_pytorch_model.safetensors").tensors
    named = {key for key in tensors if not key.endswith("pos_embed.pe")}
    assert named == set(diffusers_names(sparsectrl_tensors("scribble")))


def small_sparsectrl(folder):
    motion = MotionConfig("sparsectrl", num_heads=2, resolutions=(2,), attentions_per_block=1, up_block_modules=False)
    return save_sparsectrl(build_sparsectrl(UNet(SMALL), "rgb", motion=motion), folder / "a.safetensors")


@pytest.mark.parametrize(
    ("build", "to", "target", "message"),
    [
        (small_sparsectrl, "diffusers-sparsectrl", "x", "of another layout than the released ones.*keep the official"),
        (
            lambda f: write(f / "a.safetensors", motion_tensors("v2")),
            "hotshot-motion",
            "x.pt",
            "a animatelcm motion module, expected Hotshot-XL's",
        ),
        (
            lambda f: write(f / "a.safetensors", lora_tensors("kohya_lora")),
            "official-lora",
            "x.pt",
            "expected attentions of a UNet only, as MotionLoRAs",
        ),
        (
            lambda f: write(f / "a.safetensors", {"ip_adapter.1.to_k_ip.weight": torch.zeros(32, 40)}),
            "ip-adapter",
            "x.bin",
            "an IP-Adapter without image_proj",
        ),
        (
            lambda f: write(f / "a.safetensors", {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}),
            "embedding",
            "x.pt",
            "a textual inversion for SDXL, expected one for SD 1.x, which has two spellings",
        ),
        (
            lambda f: write(f / "a.safetensors", motion_tensors("v2")),
            "cameractrl",
            "x.pt",
            "this is a motion module, not a CameraCtrl camera encoder",
        ),
    ],
)
def test_what_has_no_such_form_is_told(tmp_path, monkeypatch, build, to, target, message):
    with pytest.raises(UserError, match=message) as error:
        converted(monkeypatch, build(tmp_path), tmp_path / target, to)
    assert "\n" not in str(error.value) and not (tmp_path / target).exists()


@pytest.mark.parametrize("to", ["diffusers-sparsectrl", "diffusers-controlnet"])
def test_no_folder_of_other_things_is_replaced(tmp_path, monkeypatch, to):
    tensors = sparsectrl_tensors("rgb") if "sparse" in to else controlnet_tensors()
    source = write(tmp_path / "a.safetensors", tensors)
    (home := tmp_path / "home").mkdir()
    (home / "diary.txt").write_text("dear diary")
    monkeypatch.setattr("sys.argv", ["convert.py", str(source), str(home), "--to", to, "--overwrite"])
    with pytest.raises(UserError, match="expected a new name: it is a folder with other content"):
        convert.main()
    assert (home / "diary.txt").exists()
