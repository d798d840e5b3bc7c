"""ControlNet files: every spelling gives one network, what is saved loads by itself, and a wrong file is named."""

from dataclasses import replace

import pytest
import torch

from animatediff.checkpoints.controlnet_files import load_controlnet, save_controlnet
from animatediff.checkpoints.files import write_state_dict
from animatediff.models.controlnet_network import ControlNet
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, ldm_tensors, motion_tensors, sparsectrl_tensors, write
from tests.checkpoints.test_sparsectrl_files import SMALL, without
from tests.control import controlnet_diffusers_tensors, controlnet_tensors

CONFIG_JSON = '{"_class_name": "ControlNetModel", "attention_head_dim": 4, "global_pool_conditions": true}'


def bare() -> dict[str, torch.Tensor]:
    return {key.removeprefix("control_model."): t for key, t in controlnet_tensors().items()}


SPELLINGS = ("v1.1", "wrapped", "v1.0", "bare", "matrices", "diffusers", "differences", "differences of 8 bits")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_network(tmp_path, base, spelling):
    tensors = {
        "v1.0": lambda: controlnet_tensors() | ldm_tensors(),
        "bare": bare,
        "matrices": lambda: {k: t[:, :, 0, 0] if ".proj_" in k and t.dim() == 4 else t for k, t in bare().items()},
        "diffusers": controlnet_diffusers_tensors,
        "differences": lambda: _differences(base.unet),
        "differences of 8 bits": lambda: _differences(base.unet, torch.float8_e4m3fn),
    }.get(spelling, controlnet_tensors)()
    path = write_state_dict(tmp_path / ("x.pth" if spelling == "wrapped" else "x.safetensors"), tensors)
    network, report = load_controlnet(path, base.unet, base.vae)
    expected = controlnet_diffusers_tensors()
    if "differences" in spelling:  # adding what was subtracted rounds once
        close = {"atol": 0.3, "rtol": 0.07} if "8 bits" in spelling else {"atol": 1e-6}
        assert all(torch.allclose(t, expected[k], **close) for k, t in network.state_dict().items())
    else:
        assert equal(dict(network.state_dict()), expected)
    assert (report.kind, report.applied, network.training) == ("controlnet", 340, False)
    assert len(report.unused) == (len(ldm_tensors()) if spelling == "v1.0" else 0)


def _differences(unet: UNet, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    base = unet.state_dict()
    tensors = {key: t - base[key] if key in base else t for key, t in controlnet_diffusers_tensors().items()}
    return {key: t.to(dtype) for key, t in tensors.items()} | {"difference": torch.zeros(1)}


def test_what_shapes_do_not_tell(tmp_path, base):
    write(tmp_path / "diffusion_pytorch_model.safetensors", controlnet_diffusers_tensors())
    (tmp_path / "config.json").write_text(CONFIG_JSON)
    with pytest.raises(UserError, match="ControlNet of num_heads 4, expected the base's 8"):
        load_controlnet(tmp_path, base.unet, base.vae)
    (tmp_path / "config.json").write_text(CONFIG_JSON.replace("{", '{"act_fn": "gelu", '))
    with pytest.raises(UserError, match="config.json: got act_fn 'gelu', expected silu or swish"):
        load_controlnet(tmp_path, base.unet, base.vae)
    (tmp_path / "config.json").write_text(CONFIG_JSON.replace("4", "8"))
    assert load_controlnet(tmp_path, base.unet, base.vae)[0].config.pooled
    (tmp_path / "config.json").unlink()
    for name in ("canny", "shuffle"):
        path = write(tmp_path / f"control_v11_sd15_{name}.safetensors", controlnet_tensors())
        assert load_controlnet(path, base.unet, base.vae)[0].config.pooled == (name == "shuffle")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "folder"])
def test_a_saved_network_loads_by_itself(tmp_path, base, name):
    network, _ = load_controlnet(write(tmp_path / "a.safetensors", controlnet_tensors()), base.unet, base.vae)
    network.config = replace(network.config, pooled=True, bgr=True)
    loaded, _ = load_controlnet(save_controlnet(network, tmp_path / name), base.unet, base.vae)
    assert equal(dict(loaded.state_dict()), dict(network.state_dict()))
    assert loaded.config == network.config


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: motion_tensors("v3"), "this is a motion module, not a ControlNet: use it as `motion_module"),
        (lambda: sparsectrl_tensors("scribble"), "this is a SparseCtrl encoder, not a ControlNet"),
        (
            lambda: without(bare(), "zero_convs.3.0.bias"),
            "1 weights are missing, such as controlnet_down_blocks.3.bias",
        ),
        (
            lambda: bare() | {"label_emb.0.0.weight": torch.zeros(1, 1)},
            "got a ControlNet for SDXL, expected one for SD 1.x",
        ),
        (lambda: bare() | {"extra.weight": torch.zeros(1, 1)}, "1 weights have no place in it"),
        (
            lambda: without(without(bare(), "hint_block.12.weight"), "hint_block.12.bias"),
            "ControlNet for 4 pixels per latent, expected the VAE's 8",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, base, build, message):
    with pytest.raises(UserError, match=message) as error:
        load_controlnet(write(tmp_path / "x.safetensors", build()), base.unet, base.vae)
    assert "\n" not in str(error.value)


def test_a_network_of_another_base_is_refused(tmp_path, base):
    path = write(tmp_path / "x.safetensors", controlnet_tensors())
    with pytest.raises(UserError, match=r"ControlNet of block_out_channels .*expected the base's \(16, 32, 48\)"):
        load_controlnet(path, UNet(SMALL), base.vae)
    write(path, _differences(base.unet))
    with pytest.raises(UserError, match=r"ControlNet of block_out_channels .*expected the base's \(16, 32, 48\)"):
        load_controlnet(path, UNet(SMALL), base.vae)
    with pytest.raises(UserError, match="for 8 pixels per latent, expected the VAE's 4"):
        load_controlnet(path, base.unet, VAE(replace(base.vae.config, block_out_channels=(32, 32, 32))))
    with pytest.raises(UserError, match="expected a ControlNet: it has no diffusion_pytorch_model"):
        load_controlnet(tmp_path, base.unet, base.vae)
    assert isinstance(load_controlnet(path, base.unet, base.vae)[0], ControlNet)
