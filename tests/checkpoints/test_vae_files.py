"""A VAE alone: what is saved comes back, every spelling is one VAE, and what does not fit is named."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from animatediff.checkpoints.diffusers_json import vae_json
from animatediff.checkpoints.export import save_vae, write_diffusers
from animatediff.checkpoints.files import file_sha256, read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.keymaps import LDM_VAE
from animatediff.checkpoints.load import load_vae
from animatediff.checkpoints.parts import read_image_parts
from animatediff.config.networks import VAEConfig
from animatediff.models.vae import VAE
from animatediff.utils import UserError
from tests.checkpoints.synthetic import METADATA, equal, ldm_tensors, lora_tensors, write


def ldm_vae(*, prefix: str = LDM_VAE) -> dict[str, Tensor]:
    return {prefix + key.removeprefix(LDM_VAE): t for key, t in ldm_tensors().items() if key.startswith(LDM_VAE)}


def test_what_is_saved_comes_back(tmp_path, base):
    """Weights, sizes and what shapes cannot tell, none of them the image model's; here in half precision."""
    torch.manual_seed(0)
    sizes = replace(base.vae.config, block_out_channels=(8, 16, 16, 24), norm_num_groups=4, scaling_factor=0.5)
    vae = VAE(sizes).half()
    path = save_vae(vae, tmp_path / "vae.safetensors", metadata={"from": "a test"})
    loaded, report = load_vae(path, base)
    assert loaded.config == sizes and not loaded.training
    assert equal(loaded.half().state_dict(), vae.state_dict())
    assert report.applied == len(vae.state_dict()) and report.sha256 == file_sha256(path)
    assert "its scaling factor is 0.5, the image model's 0.18215" in str(report)
    assert "encoder.mid.attn_1.q.weight" in read_state_dict(path).tensors  # as Stability's own files
    assert identify(path).metadata["from"] == "a test"


def as_trained(folder, base):
    """As the training of an autoencoder saves it: bare keys below `state_dict`, with its loss."""
    content = {"state_dict": ldm_vae(prefix="") | {"loss.logvar": torch.zeros(())}, "global_step": 840000}
    torch.save(content, folder / "vae.ckpt")
    return folder / "vae.ckpt"


def as_diffusers(folder, base):
    write(folder / "diffusion_pytorch_model.safetensors", base.vae.state_dict())
    (folder / "config.json").write_text(json.dumps(vae_json(replace(base.vae.config, scaling_factor=0.25))))
    return folder


FORMS = {
    "bare": lambda folder, base: write(folder / "vae.safetensors", ldm_vae(prefix="")),
    "prefixed": lambda folder, base: write(folder / "vae.pt", ldm_vae()),
    "training checkpoint": as_trained,
    "diffusers folder": as_diffusers,
    "diffusers file": lambda folder, base: as_diffusers(folder, base) / "diffusion_pytorch_model.safetensors",
    "image model": lambda folder, base: write(folder / "model.safetensors", ldm_tensors(), **METADATA),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_vae(tmp_path, base, name):
    path = FORMS[name](tmp_path, base)
    vae, report = load_vae(path, base)
    assert equal(vae.state_dict(), base.vae.state_dict())
    assert vae.config.scaling_factor == (0.25 if "diffusers" in name else base.vae.config.scaling_factor)
    assert ("of a whole image model the VAE alone is used" in report.notes) == (name == "image model")
    assert len(report.unused) == (name == "training checkpoint")
    if name != "image model":
        assert identify(path).config_line == f"vae_path: {path}"


def test_the_vae_of_a_diffusers_model(tmp_path, ldm_file, base):
    """With or without the rest of the folder."""
    folder = write_diffusers(read_image_parts(ldm_file), tmp_path / "model")
    for path in (folder, folder / "vae"):
        assert equal(load_vae(path, base)[0].state_dict(), base.vae.state_dict())


@pytest.mark.parametrize("setting", [{"act_fn": "gelu"}, {"shift_factor": 0.5}, {"latents_mean": [1, 1, 1, 1]}])
def test_settings_of_another_network_are_refused(tmp_path, base, setting):
    folder = as_diffusers(tmp_path, base)
    (folder / "config.json").write_text(json.dumps(vae_json(base.vae.config) | setting))
    with pytest.raises(UserError, match=f"config.json: got {next(iter(setting))} .*, expected"):
        load_vae(folder, base)


def test_the_image_model_says_what_the_file_does_not(tmp_path, base):
    image = replace(base, vae=VAE(replace(base.vae.config, norm_num_groups=16, scaling_factor=0.5)))
    vae, _ = load_vae(write(tmp_path / "vae.safetensors", ldm_vae()), image)
    assert vae.config == image.vae.config
    assert load_vae(tmp_path / "vae.safetensors", replace(base, vae=None))[0].config == base.vae.config


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latent_channels": 16}, "a VAE of 16 latent channels, for an image model of 4: choose a VAE made for"),
        ({"in_channels": 1}, "a VAE of 1 image channels, for an image model of 3"),
        ({"block_out_channels": (8, 16)}, "a VAE of 2 pixels to a latent's side, for an image model of 8"),
    ],
)
def test_other_sizes_are_refused(tmp_path, base, sizes, message):
    small = VAEConfig(**{"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} | sizes)
    with pytest.raises(UserError, match=f"vae.safetensors, {message}"):
        load_vae(save_vae(VAE(small), tmp_path / "vae.safetensors"), base)


def test_other_and_incomplete_files_are_refused(tmp_path, base):
    missing = {key: t for key, t in ldm_vae().items() if "mid.block_1.conv1" not in key}
    strange = ldm_vae(prefix="") | {"temporal.weight": torch.zeros(1)}
    without = {key: t for key, t in ldm_tensors().items() if not key.startswith(LDM_VAE)}
    (tmp_path / "empty").mkdir()
    for path, message in (
        (write(tmp_path / "lora.safetensors", lora_tensors("kohya_lora")), "a LoRA of an image model, not a VAE"),
        (write(tmp_path / "part.safetensors", missing), "expected a complete VAE .*: 4 weights are missing"),
        (write(tmp_path / "more.safetensors", strange), "1 entries that belong to no part of an image model"),
        (write(tmp_path / "no.safetensors", without), "an image model without a VAE, expected one"),
        (tmp_path / "empty", "the folder .*empty, expected a VAE: it has no diffusion_pytorch_model file"),
        (tmp_path / "nowhere.pt", "there is no such file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_vae(path, base)
        assert "\n" not in str(error.value)
