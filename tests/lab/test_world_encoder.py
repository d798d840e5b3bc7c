"""The stage of the world's encoder: it learns, goes on, and its file is an encoder."""

import json

import pytest
import torch
import yaml

from animatediff.checkpoints.files import write_state_dict
from animatediff.config.networks import SmallCLIPConfig
from animatediff.lab.stage_table import load_train_config
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError
from animatediff.world.encoder import WorldEncoder, load_encoder, new_small_clip

CONFIG = {
    "stage": "shapes_encoder",
    "encoder": {"channels": [8, 16], "width": 16, "text_layers": 1},
    "loop": {"steps": 20, "batch_size": 16, "learning_rate": 5e-3, "warmup_steps": 1, "log_every": 1, "ema_decay": 0.5},
}


@pytest.mark.slow
def test_the_stage(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"output_dir": str(tmp_path)}))
    lines = []
    load_train_config(tmp_path / "run.yaml").run(lines.append)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert lines[-1].startswith("held-out scenes, percent right: caption ")
    encoder = load_encoder(str(tmp_path / "encoder.safetensors"))
    assert isinstance(encoder, WorldEncoder) and encoder.name.startswith(str(tmp_path))
    assert encoder.model.config == SmallCLIPConfig(channels=(8, 16), width=16, text_layers=1)
    texts = encoder.encode_texts(["a red star", "a red star moving left on a white background " * 9])
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)


def test_words_of_the_world_and_others():
    torch.manual_seed(0)
    model = new_small_clip(SmallCLIPConfig(channels=(8,), width=16)).eval()
    tokens = Tokenizer()(["a red star", "a red fox", "a red owl", "a blue star"])[:, 0, :8]
    with torch.no_grad():
        short, longer = model.encode_tokens(tokens), model.encode_tokens(torch.cat([tokens, tokens[:, -1:]], dim=1))
    assert torch.allclose(short, longer, atol=1e-6)  # padding does not count
    assert torch.allclose(short[1], short[2])  # words that the world never says are one
    for other in (1, 3):
        assert not torch.allclose(short[0], short[other], atol=1e-3)


def test_another_file_is_no_encoder(tmp_path):
    write_state_dict(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="x.safetensors, expected an encoder of Shapes, the toy data set"):
        WorldEncoder.from_file(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="got no encoder at .*y.safetensors: train stage shapes_encoder"):
        WorldEncoder.from_file(tmp_path / "y.safetensors")
