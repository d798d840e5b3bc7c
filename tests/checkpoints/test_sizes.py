"""Sizes and versions from shapes and metadata."""

import pytest
import torch

from animatediff.checkpoints import sizes
from animatediff.checkpoints.keymaps import MOTION_MARK
from animatediff.checkpoints.metadata import prediction_type
from animatediff.config.networks import MOTION_VERSIONS, MotionConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError
from tests.checkpoints.synthetic import motion_tensors

UNETS = [
    UNetConfig(),
    UNetConfig(block_out_channels=(32, 64, 96), attention_levels=(False, True, True), context_dim=24, num_heads=4),
    UNetConfig(
        block_out_channels=(16, 48),
        attention_levels=(True, False),
        layers_per_block=1,
        context_dim=8,
        norm_num_groups=16,
        num_transformer_blocks=2,
        linear_projection=True,
        in_channels=6,
        out_channels=3,
    ),
]
TEXT = TextConfig(vocab_size=100, width=48, layers=3, num_heads=6, mlp_width=64, max_length=11, activation="gelu")


def on_meta(module, config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return module(config).state_dict()


@pytest.mark.parametrize("config", UNETS)
def test_unet_sizes_are_read_back(config):
    metadata = sizes.image_metadata_of(config, None, TEXT)
    assert sizes.unet_config(on_meta(UNet, config), metadata) == config


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, scaling_factor=0.5),
        VAEConfig(in_channels=1, latent_channels=3, block_out_channels=(32,)),
    ],
)
def test_vae_sizes_are_read_back(config):
    metadata = sizes.image_metadata_of(UNETS[0], config, TEXT)
    assert sizes.vae_config(on_meta(VAE, config), metadata) == config


def test_text_sizes_are_read_back():
    metadata = sizes.image_metadata_of(UNETS[0], None, TEXT)
    assert sizes.text_config(on_meta(TextEncoder, TEXT), metadata) == TEXT


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (128, 2), (40, 1)])
def test_text_heads_default_to_clips_head_width(width, heads):
    config = TextConfig(vocab_size=10, width=width, layers=1, num_heads=1, mlp_width=8)
    assert sizes.text_config(on_meta(TextEncoder, config), {}).num_heads == heads


@pytest.mark.parametrize(
    "motion",
    [
        *MOTION_VERSIONS.values(),
        MotionConfig(version="v2", max_frames=16, mid_block=True, num_heads=4, num_transformer_blocks=2),
        MotionConfig(resolutions=(2, 4), attentions_per_block=3, norm_over_frames=True),
        MotionConfig(positional_encoding=False, num_heads=4),
        MotionConfig(temporal="convolution", attentions_per_block=3, num_transformer_blocks=2, mid_block=True),
    ],
)
def test_motion_sizes_are_read_back(motion):
    base = UNetConfig(block_out_channels=(32, 64, 96), attention_levels=(True,) * 3, context_dim=8)
    if motion.resolutions == (1, 2, 4, 8):
        motion = MotionConfig(**(vars(motion) | {"resolutions": (1, 2, 4)}))
    tensors = {k: t for k, t in on_meta(UNet, base.with_motion(motion)).items() if MOTION_MARK in k}
    metadata = sizes.motion_metadata_of(motion)
    assert sizes.motion_config(tensors, metadata, levels=3, length=None) == motion


# layout, positional length, metadata, what the config asks for -> version, or words of the error
VERSIONS = [
    ("v1", 24, {}, None, "v1"),
    ("v3", 32, {}, None, "v3"),
    ("v2", 32, {}, None, "v2"),
    ("v2", None, {}, None, "animatelcm"),
    ("v2", None, {}, "v2", "v2"),
    ("v1", None, {}, "v1", "v1"),
    ("v3", None, {}, "v3", "v3"),
    ("v3", 16, {}, "v3", "v3"),
    ("v3", 32, {"version": "v1"}, None, "v1"),
    ("v3", None, {"version": "v3"}, "v3", "v3"),
    ("v3", None, {}, None, "version cannot be told.*set `version: v1` or `version: v3`"),
    ("v3", 16, {}, None, "version cannot be told.*16 frames"),
    ("v2", 32, {}, "v1", r"got a v2 module \(has a mid block\) with a v1 config: set `version: v2`"),
    ("v2", None, {}, "v3", r"\(has a mid block.*with a v3 config"),
    ("v3", 32, {}, "v2", r"got a v3 module \(has no mid block.*with a v2 config"),
    ("v3", None, {}, "v2", "got a v1 or v3 module.*with a v2 config"),
    ("v3", 32, {}, "v1", "got a v3 module .*32 frames.*with a v1 config"),
    ("v1", 24, {}, "v3", "got a v1 module .*24 frames.*with a v3 config"),
    ("v3", 32, {"version": "v1"}, "v3", r"got a v1 module \(its metadata says so\) with a v3 config"),
    ("v3", None, {"version": "v9"}, None, "version 'v9' in the metadata, expected one of v1, v2"),
    ("v3", 32, {}, "v9", "got version 'v9', expected one of v1, v2"),
]


@pytest.mark.parametrize(("layout", "length", "metadata", "asked", "outcome"), VERSIONS)
def test_versions(layout, length, metadata, asked, outcome):
    tensors = motion_tensors(layout)
    if outcome in MOTION_VERSIONS:
        assert sizes.resolve_version(tensors, metadata, length=length, asked=asked) == outcome
    else:
        with pytest.raises(UserError, match=outcome):
            sizes.resolve_version(tensors, metadata, length=length, asked=asked)


def test_v1_norms_pool_over_frames_and_lengths_come_from_the_file():
    config = sizes.motion_config(motion_tensors("v1"), {}, levels=4, length=24)
    assert config.resnet_norm_over_frames and config.max_frames == 24
    longer = sizes.motion_config(motion_tensors("v2"), {}, levels=4, length=128)
    assert longer.max_frames == 128 and not longer.resnet_norm_over_frames


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"num_heads": "eight"}, "num_heads 'eight' in the metadata, expected a whole number"),
        ({"num_heads": "0"}, "num_heads '0'"),
        ({"num_heads": "7"}, "num_heads 7, expected a divisor of the widths 320, 640, 1280"),
        ({"norm_num_groups": "33"}, "norm_num_groups 33, expected a divisor"),
    ],
)
def test_impossible_metadata_is_named(metadata, message):
    with pytest.raises(UserError, match=message):
        sizes.unet_config(on_meta(UNet, UNETS[0]), metadata)


def test_only_metadata_tells_of_a_module_without_positional_encoding():
    """Files without the table, such as AnimateLCM's, are of modules that have the encoding."""
    motion = {"tensors": motion_tensors("v2"), "levels": 4, "length": None}
    assert sizes.motion_config(metadata={}, **motion).positional_encoding
    assert not sizes.motion_config(metadata={"positional_encoding": "false"}, **motion).positional_encoding
    with pytest.raises(UserError, match="positional_encoding 'no' in the metadata, expected one of true, false"):
        sizes.motion_config(metadata={"positional_encoding": "no"}, **motion)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "half"])
def test_impossible_scaling_factors_are_named(text):
    with pytest.raises(UserError, match=f"vae_scaling_factor '{text}' in the metadata, expected a positive number"):
        sizes.vae_config(on_meta(VAE, VAEConfig()), {"vae_scaling_factor": text})


def test_unknown_text_activations_are_named():
    with pytest.raises(UserError, match="text_activation 'swish' in the metadata, expected one of quick_gelu, gelu"):
        sizes.text_config(on_meta(TextEncoder, TEXT), {"text_activation": "swish"})


def test_prediction_types():
    assert prediction_type({}) is None
    assert prediction_type({"prediction_type": "v_prediction"}) == "v_prediction"
    with pytest.raises(UserError, match="prediction_type 'noise'"):
        prediction_type({"prediction_type": "noise"})
