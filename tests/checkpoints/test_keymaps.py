"""Key tables against the official ones, and for layouts that no released model has."""

import pytest
import torch

from animatediff.checkpoints import keymaps
from animatediff.checkpoints.keymaps import LDM_TEXT, LDM_UNET, LDM_VAE, inverted, translate
from animatediff.config.networks import MOTION_VERSIONS, TextConfig, UNetConfig, VAEConfig
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from tests.checkpoints.synthetic import TABLES, WIDTHS

NANO = UNetConfig(block_out_channels=WIDTHS, context_dim=40)
LAYOUTS = [
    (2, (True, True, True, False)),
    (1, (False, True, True)),
    (3, (True, False)),
    (2, (True,)),
]


def shapes(build) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {key: list(t.shape) for key, t in build().state_dict().items()}


def golden(prefix: str) -> dict[str, list[int]]:
    """The part of the official single file below `prefix`."""
    return {k.removeprefix(prefix): s for k, s in TABLES["ldm_checkpoint"].items() if k.startswith(prefix)}


def renamed(table: dict[str, list[int]], names: dict[str, str]) -> dict[str, list[int]]:
    return {translate(key, names) or key: shape for key, shape in table.items()}


def test_our_unet_under_ldm_names_is_the_official_table():
    names = keymaps.unet_table(layers=2, attention_levels=NANO.attention_levels)
    ours = shapes(lambda: UNet(NANO))
    assert len(ours) == 686
    assert renamed(ours, names) == golden(LDM_UNET)
    assert renamed(golden(LDM_UNET), inverted(names)) == ours


def test_our_vae_under_ldm_names_is_the_official_table():
    names = keymaps.vae_table(levels=4, layers=2)
    ours = shapes(lambda: VAE(VAEConfig(block_out_channels=(32, 32, 64, 64))))
    official = {
        key: shape[:2] if ".attn_1." in key and key.endswith("weight") else shape
        for key, shape in golden(LDM_VAE).items()
    }
    assert renamed(ours, names) == official
    assert renamed(official, inverted(names)) == ours


def test_our_text_encoder_has_the_official_names():
    config = TextConfig(width=40, layers=2, num_heads=4, mlp_width=80)
    assert shapes(lambda: TextEncoder(config)) == golden(LDM_TEXT)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_our_motion_modules_have_the_official_names(version):
    ours = shapes(lambda: UNet(NANO.with_motion(MOTION_VERSIONS[version])))
    motion = {key: shape for key, shape in ours.items() if keymaps.MOTION_MARK in key}
    assert motion == TABLES["motion_module"][version]


def test_layouts_are_read_from_the_official_keys():
    assert keymaps.unet_layout(golden(LDM_UNET)) == (2, (True, True, True, False))
    assert keymaps.vae_layout(golden(LDM_VAE)) == (4, 2)


@pytest.mark.parametrize(("layers", "attention"), LAYOUTS)
def test_any_unet_layout_survives_the_way_there_and_back(layers, attention):
    widths = (32, 64, 64, 96)[: len(attention)]
    config = UNetConfig(block_out_channels=widths, attention_levels=attention, layers_per_block=layers, context_dim=8)
    ours = list(shapes(lambda: UNet(config)))
    names = keymaps.unet_table(layers=layers, attention_levels=attention)
    ldm = [translate(key, names) for key in ours]
    assert None not in ldm and len(set(ldm)) == len(ours)
    assert keymaps.unet_layout(ldm) == (layers, attention)
    assert [translate(key, inverted(names)) for key in ldm] == ours


@pytest.mark.parametrize(("levels", "layers"), [(4, 2), (3, 1), (1, 1)])
def test_any_vae_layout_survives_the_way_there_and_back(levels, layers):
    config = VAEConfig(block_out_channels=(32,) * levels, layers_per_block=layers)
    ours = list(shapes(lambda: VAE(config)))
    names = keymaps.vae_table(levels=levels, layers=layers)
    ldm = [translate(key, names) for key in ours]
    assert None not in ldm and len(set(ldm)) == len(ours)
    assert keymaps.vae_layout(ldm) == (levels, layers)
    assert [translate(key, inverted(names)) for key in ldm] == ours


def test_layers_are_numbered_through_as_ldm_does():
    """Three levels of one layer, attention in the lower two: read off LDM's UNetModel by hand."""
    names = keymaps.unet_table(layers=1, attention_levels=(False, True, True))
    expected = {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0.conv1": "input_blocks.3.0.in_layers.2",
        "down_blocks.2.attentions.0": "input_blocks.5.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.2.resnets.1.conv_shortcut": "output_blocks.5.0.skip_connection",
    }
    assert {key: names[key] for key in expected} == expected
    assert "up_blocks.2.attentions.0" not in names


def test_motion_names_match_diffusers():
    official = "up_blocks.1.motion_modules.2.temporal_transformer.transformer_blocks.0."
    diffusers = "up_blocks.1.motion_modules.2.transformer_blocks.0."
    pairs = {
        "attention_blocks.1.to_out.0.bias": "attn2.to_out.0.bias",
        "norms.0.weight": "norm1.weight",
        "ff_norm.bias": "norm3.bias",
        "ff.net.0.proj.weight": "ff.net.0.proj.weight",
    }
    for ours, theirs in pairs.items():
        assert keymaps.motion_to_diffusers(official + ours) == diffusers + theirs
        assert keymaps.motion_to_official(diffusers + theirs) == official + ours


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_motion_name_survives_the_way_there_and_back(version):
    keys = list(TABLES["motion_module"][version])
    there = [keymaps.motion_to_diffusers(key) for key in keys]
    assert len(set(there)) == len(keys) and not any("temporal_transformer" in key for key in there)
    assert [keymaps.motion_to_official(key) for key in there] == keys
    assert [keymaps.motion_to_official(key) for key in keys] == keys, "official names stay as they are"
