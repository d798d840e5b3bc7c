"""The config lines that scripts/doctor.py prints: each does what it says when it is pasted into a config."""

import shutil

import pytest
import torch
import yaml
from PIL import Image

from animatediff.checkpoints.diffusers_json import UNET_STEM
from animatediff.checkpoints.file_kinds import KINDS
from animatediff.checkpoints.files import write_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.keymaps import motion_to_diffusers
from animatediff.config.prompt_yaml import load_config
from animatediff.models.ifnet import VERSIONS, IFNet
from animatediff.pipeline.headers import check_requests
from tests import control, families
from tests.checkpoints.synthetic import (
    METADATA,
    ldm_tensors,
    lora_tensors,
    motion_tensors,
    sparsectrl_tensors,
    with_positional,
    write,
)
from tests.nano import entry, write_config, write_files

COMPARED = (
    "sdxl-checkpoint",
    "sdxl-lora",
    "sdxl-textual-inversion",
    "sdxl-controlnet",
    "sdxl-ip-adapter",
    "sdxl-unet",
    "diffusers-folder",
)  # by the tests of SDXL, folders


def vae_tensors():
    prefix = "first_stage_model."
    return {key.removeprefix(prefix): t for key, t in ldm_tensors().items() if key.startswith(prefix)}


FILES = {
    "sd1-checkpoint": ldm_tensors,
    "motion-module": lambda: with_positional(motion_tensors("v3"), 32),
    "motion-adapter": lambda: {motion_to_diffusers(k): t for k, t in motion_tensors("v2").items()},
    "motion-lora": lambda: lora_tensors("motion_lora"),
    "domain-adapter": lambda: lora_tensors("domain_adapter"),
    "lora": lambda: lora_tensors("kohya_lora"),
    "sparsectrl": lambda: sparsectrl_tensors("scribble"),
    "vae": vae_tensors,
    "textual-inversion": lambda: {"emb_params": torch.ones(2, 40)},
    "controlnet": control.controlnet_tensors,
    "ip-adapter": lambda: control.ip_adapter_tensors("base"),
    "cameractrl": families.cameractrl_tensors,
    "pia": lambda: families.conditioned_motion_tensors("pia"),
    "animatelcm-i2v": lambda: families.conditioned_motion_tensors("animatelcm_i2v"),
    "rife": lambda: IFNet(VERSIONS["4.6"]).state_dict(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    Image.new("RGB", (16, 16)).save(folder / "picture.png")
    control.write_image_encoder(folder / "image_encoder")
    return folder


def test_every_kind_with_a_line_is_tried():
    assert set(FILES) | set(COMPARED) | {"sd1-unet", "image-encoder"} == {
        name for name, kind in KINDS.items() if kind.config
    }


@pytest.mark.parametrize("kind", FILES)
def test_the_line_works(folder, tmp_path, monkeypatch, kind):
    metadata = METADATA if kind == "sd1-checkpoint" else {}
    path = write(tmp_path / f"{kind} of mine.safetensors", FILES[kind](), **metadata)
    check(folder, tmp_path, monkeypatch, path, kind)


@pytest.mark.parametrize("kind", ["motion-lora", "lora", "motion-module", "sparsectrl"])
def test_the_line_of_a_folder_works(folder, tmp_path, monkeypatch, kind):
    model = tmp_path / "model.v2"
    model.mkdir()
    stem = "pytorch_lora_weights" if "lora" in kind else UNET_STEM
    write_state_dict(model / f"{stem}.safetensors", FILES[kind]())
    check(folder, tmp_path, monkeypatch, model, kind)


def test_a_lora_with_the_keys_of_a_domain_adapter_is_taken(folder, tmp_path):
    """As diffusers wrote LoRAs at first."""
    config = write_config(tmp_path / "config.yaml", entry(folder, lora_model_path=str(folder / "adapter.safetensors")))
    (checked,) = check_requests(load_config(config).entries)
    assert checked.headers.infos["model.loras[0].path"].kind == "domain-adapter"


def check(folder, tmp_path, monkeypatch, path, kind):
    info = identify(path)
    assert info.kind == kind
    for name in ("picture.png", "image_encoder"):
        (shutil.copytree if name == "image_encoder" else shutil.copy)(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    pasted = yaml.safe_load(info.config_line)
    values = entry(
        folder, H=64, W=64, **({"motion_module": str(folder / "mm_v2.safetensors")} if kind == "motion-lora" else {})
    )
    if kind == "textual-inversion":
        values["prompt"] = [f"a {path.stem}"]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump([values | pasted]), encoding="utf-8")
    (checked,) = check_requests(load_config(config).entries)
    assert path in checked.headers.paths.values()
