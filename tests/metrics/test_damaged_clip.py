"""A local CLIP whose files are damaged is one line, or an encoder."""

import json

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict, write_state_dict
from animatediff.metrics.encoders import LocalCLIP
from animatediff.utils import UserError
from tests.tiny_clip import write_clip

ODD = [0, -1, 7, 10**9, 0.5, "4", None, [], {}, 1e300]
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")


def use(folder) -> None:
    encoder = LocalCLIP(folder)
    assert encoder.encode_images(torch.zeros(1, 3, 32, 32)).shape == encoder.encode_texts(["a"]).shape


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_configs(tmp_path, part):
    """Every value of a config in turn."""
    write_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"text_config": ("vocab_size", "max_position_embeddings"), "vision_config": ("image_size", "patch_size")}[
        part
    ]
    for key in (*KEYS, *own):
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps(config | {part: config[part] | {key: value}}))
            try:
                use(tmp_path)
            except UserError as error:
                assert len(str(error).splitlines()) == 1
    for value in ODD:
        (tmp_path / "config.json").write_text(json.dumps(config | {part: value}))
        try:
            use(tmp_path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("value", [0, "x", [1], [1, 2, "x"], [1, 2, None], {"a": 1}, [[1], [2], [3]], [10**400, 1, 1]])
def test_preprocessing(tmp_path, value):
    write_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": value}))
    with pytest.raises(UserError, match="image_mean of .*, expected three numbers"):
        use(tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    write_clip(tmp_path)
    tensors = read_state_dict(tmp_path / "model.safetensors").tensors
    tensors["text_projection.weight"] = torch.full_like(tensors["text_projection.weight"], torch.nan)
    write_state_dict(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match="whose text_projection.weight is not finite"):
        use(tmp_path)
