"""SDXL's published sizes on the meta device, where its 3.5 billion parameters take no memory.

`python -m pytest -s tests/models/test_sdxl_sizes.py` prints the table of docs/checkpoints.md.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from animatediff.config.networks import MOTION_VERSIONS, TextConfig, UNetConfig, VAEConfig
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE

BASE = UNetConfig(
    block_out_channels=(320, 640, 1280),
    attention_levels=(False, True, True),
    context_dim=768 + 1280,
    num_transformer_blocks=(0, 2, 10),
    linear_projection=True,
    head_dim=64,
    added_channels=1280 + 6 * 256,
)
REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536),
    attention_levels=(False, True, True, False),
    context_dim=1280,
    num_transformer_blocks=4,
    linear_projection=True,
    head_dim=64,
    added_channels=1280 + 5 * 256,
)
TEXT_2 = TextConfig(width=1280, layers=32, num_heads=20, mlp_width=5120, activation="gelu", projection_width=1280)

# what it is -> builder, which weights count, published parameters and tensors
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, int, int]] = {
    "UNet": (lambda: UNet(BASE), "", 2_567_463_684, 1_680),
    "first text encoder": (lambda: TextEncoder(TextConfig()), "", 123_060_480, 196),
    "second text encoder": (lambda: TextEncoder(TEXT_2), "", 694_659_840, 517),
    "VAE": (lambda: VAE(VAEConfig()), "", 83_653_863, 248),
    "SDXL-beta module": (
        lambda: UNet(BASE.with_motion(MOTION_VERSIONS["sdxl-beta"])), "motion_modules.", 236_779_200, 390,
    ),
    "Hotshot-XL module": (
        lambda: UNet(BASE.with_motion(MOTION_VERSIONS["hotshot-xl"])), "motion_modules.", 236_779_200, 390,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_published_sizes(name):
    build, part, parameters, tensors = NETWORKS[name]
    with torch.device("meta"):
        found = [p.numel() for key, p in build().named_parameters() if part in key]
    assert (sum(found), len(found)) == (parameters, tensors)
    print(f"\n| {name} | {parameters / 1e6:.0f} M | {2 * parameters / 1e9:.2f} GB | {4 * parameters / 1e9:.2f} GB |")


def test_heads_and_depths_of_the_levels():
    with torch.device("meta"):
        unet = UNet(BASE)
    depths = [[len(a.transformer_blocks) for a in block.attentions or ()] for block in unet.down_blocks]
    assert depths == [[], [2, 2], [10, 10]]
    assert len(unet.mid_block.attentions[0].transformer_blocks) == 10
    heads = {block.attentions[0].transformer_blocks[0].attn1.num_heads for block in unet.down_blocks[1:]}
    assert heads == {10, 20}


def test_the_refiner_has_four_levels():
    with torch.device("meta"):
        unet = UNet(REFINER)
    assert unet.add_embedding.linear_1.in_features == 2560
    assert [bool(block.attentions) for block in unet.down_blocks] == [False, True, True, False]
    assert unet.down_blocks[1].attentions[0].transformer_blocks[3].attn2.to_k.in_features == 1280


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_step_on_the_meta_device():
    """16 frames of 1024 x 1024: shapes fit from the first layer to the last."""
    with torch.device("meta"):
        unet = UNet(BASE.with_motion(MOTION_VERSIONS["sdxl-beta"]))
        inputs = {"pooled": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        out = unet(torch.empty(1, 16, 4, 128, 128), torch.empty(1), torch.empty(1, 77, 2048), **inputs)
    assert out.shape == (1, 16, 4, 128, 128)


@pytest.mark.parametrize("missing", ["pooled", "time_ids"])
def test_added_conditioning_is_asked_for(missing):
    with torch.device("meta"):
        unet = UNet(BASE)
        inputs = {"pooled": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        inputs[missing] = None
        with pytest.raises(ValueError, match="expected both"):
            unet(torch.empty(1, 1, 4, 8, 8), torch.empty(1), torch.empty(1, 77, 2048), **inputs)
