"""SparseCtrl files: every spelling gives one network, what is saved loads by itself, and a wrong file is named."""

from dataclasses import replace

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.keymaps import MOTION_MARK, motion_to_diffusers
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl, save_sparsectrl
from animatediff.config.networks import MOTION_VERSIONS, UNetConfig, VAEConfig
from animatediff.models.sparsectrl_encoder import build_sparsectrl
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, ldm_tensors, motion_tensors, sparsectrl_tensors, with_positional, write

SMALL = UNetConfig(
    block_out_channels=(16, 32, 48),
    attention_levels=(False, True, True),
    layers_per_block=1,
    context_dim=24,
    num_heads=4,
    norm_num_groups=16,
)


def diffusers_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {motion_to_diffusers(key) if MOTION_MARK in key else key: t for key, t in tensors.items()}


@pytest.mark.parametrize("spelling", ["wrapped", "distributed", "positional", "diffusers", "folder"])
def test_every_spelling_gives_the_same_encoder(tmp_path, base, spelling):
    plain = sparsectrl_tensors("rgb")
    content = {
        "wrapped": {"controlnet": plain, "animatediff_config": {"x": 1}},
        "distributed": {"controlnet": {f"module.{key}": t for key, t in plain.items()}},
        "positional": with_positional(plain, 32),
        "diffusers": diffusers_names(plain),
        "folder": diffusers_names(plain),
    }[spelling]
    path = tmp_path / ("diffusion_pytorch_model.bin" if spelling == "folder" else "x.ckpt")
    torch.save(content, path)
    encoder, report = load_sparsectrl(path.parent if spelling == "folder" else path, base.unet, base.vae)
    assert equal(encoder.state_dict(), plain)
    assert (report.kind, report.version, report.applied) == ("sparsectrl", "rgb", 478)
    assert not encoder.training and encoder.config.unet.motion == MOTION_VERSIONS["sparsectrl"]
    if spelling == "folder":
        (tmp_path / "config.json").write_text('{"_class_name": "SparseControlNetModel", "norm_eps": 0.001}')
        with pytest.raises(UserError, match="config.json: got norm_eps 0.001, expected 1e-05"):
            load_sparsectrl(tmp_path, base.unet, base.vae)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", ["rgb", "scribble"])
def test_a_saved_encoder_loads_by_itself(tmp_path, kind, suffix):
    """All sizes away from SD 1.5's, and of the official wrapper where it is a pickle."""
    unet, vae = UNet(SMALL), VAE(VAEConfig(block_out_channels=(16, 16, 16), norm_num_groups=8))
    temporal = {"rgb": {"positional_encoding": False}, "scribble": {"temporal": "convolution"}}[kind]
    motion = replace(MOTION_VERSIONS["sparsectrl"], max_frames=16, num_heads=2, resolutions=(2, 4), **temporal)
    encoder = build_sparsectrl(unet, kind, downsampling=4, motion=motion)
    path = save_sparsectrl(encoder, tmp_path / f"x{suffix}", metadata={"stage": "sparsectrl"})
    loaded, _ = load_sparsectrl(path, unet, vae)
    assert loaded.config == replace(encoder.config, unet=replace(encoder.config.unet, out_channels=4))
    assert equal(loaded.state_dict(), encoder.state_dict())
    assert read_state_dict(path).metadata["stage"] == "sparsectrl"
    if suffix == ".ckpt":
        assert equal(torch.load(path)["controlnet"], encoder.state_dict())
    half = save_sparsectrl(encoder, tmp_path / f"half{suffix}", dtype=torch.float16)
    assert {t.dtype for t in read_state_dict(half).tensors.values()} == {torch.float16}
    info = identify(path)
    assert (info.kind, info.version) == ("sparsectrl", kind)
    assert info.config_line.startswith(f"controlnet_path: {path}\ncontrolnet_images: ")


def without(tensors: dict[str, torch.Tensor], end: str) -> dict[str, torch.Tensor]:
    return {key: t for key, t in tensors.items() if not key.endswith(end)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: motion_tensors("v3"), "this is a motion module, not a SparseCtrl encoder: use it as `motion_module"),
        (ldm_tensors, "this is an SD 1.x image model in one file, not a SparseCtrl encoder"),
        (lambda: without(sparsectrl_tensors("rgb"), "conv_in.bias"), "1 weights are missing, such as conv_in.bias"),
        (lambda: sparsectrl_tensors("rgb") | {"out.bias": torch.zeros(1)}, "1 weights have no place in it"),
        (
            lambda: without(sparsectrl_tensors("scribble"), "embedding.blocks.4.weight"),
            "complete SparseCtrl encoder.*such as controlnet_cond_embedding.blocks.4.weight",
        ),
        (
            lambda: without(sparsectrl_tensors("scribble"), "embedding.blocks.5.weight"),
            "for 4 pixels per latent, expected the VAE's 8: choose a SparseCtrl encoder made for this base",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, base, build, message):
    with pytest.raises(UserError, match=message) as error:
        load_sparsectrl(write(tmp_path / "x.safetensors", build()), base.unet, base.vae)
    assert "\n" not in str(error.value)


def test_an_encoder_of_another_base_is_refused(tmp_path, base):
    path = write(tmp_path / "x.safetensors", sparsectrl_tensors("rgb"))
    with pytest.raises(
        UserError, match=r"of block_out_channels \(32, 64, 64, 96\), expected the base's \(16, 32, 48\)"
    ):
        load_sparsectrl(path, UNet(SMALL), base.vae)
    with pytest.raises(UserError, match="for 4 latent channels, expected the VAE's 8"):
        load_sparsectrl(path, base.unet, VAE(replace(base.vae.config, latent_channels=8)))
    with pytest.raises(
        UserError, match="the folder .* expected a SparseCtrl encoder: it has no diffusion_pytorch_model"
    ):
        load_sparsectrl(tmp_path, base.unet, base.vae)
