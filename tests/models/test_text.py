"""Tokenizer and text encoder against the standard tokenizer's ids and the official implementation's numbers."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from animatediff.config.networks import TextConfig
from animatediff.models.text import END, START, TextEncoder, Tokenizer, build_vocabulary, read_bundled_merges
from animatediff.utils import UserError
from tests.golden.synthetic_weights import synthetic_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
START_ID, END_ID = 49406, 49407
LDM_PREFIX = "cond_stage_model.transformer."
NANO = TextConfig(width=40, layers=2, num_heads=4, mlp_width=80)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def nano_weights() -> dict[str, torch.Tensor]:
    table = json.loads((GOLDEN / "nano/keys.json").read_text(encoding="utf-8"))["ldm_checkpoint"]
    return {
        key.removeprefix(LDM_PREFIX): torch.from_numpy(synthetic_tensor("nano", key, shape))
        for key, shape in table.items()
        if key.startswith(LDM_PREFIX + "text_model.") and not key.endswith("position_ids")
    }


def load_nano(weights: dict[str, torch.Tensor], config: TextConfig = NANO) -> TextEncoder:
    with torch.device("meta"):
        encoder = TextEncoder(config)
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval()


@pytest.fixture(scope="module")
def nano(nano_weights) -> TextEncoder:
    return load_nano(nano_weights)


# --- tokenizer ---


def test_vocabulary_follows_from_the_merges():
    merges = read_bundled_merges()
    vocabulary = build_vocabulary(merges)
    assert len(merges) == 48894 and len(vocabulary) == 49408
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["in"]) == (0, 256, 512)
    assert (vocabulary[START], vocabulary[END]) == (START_ID, END_ID)


@pytest.mark.parametrize("prompt", TOKENS, ids=range(len(TOKENS)))
def test_first_chunk_has_the_standard_ids(tokenizer, prompt):
    assert tokenizer([prompt])[0, 0].tolist() == TOKENS[prompt]


def test_long_prompt_is_chunked_not_cut(tokenizer):
    prompts = ["cat dog " * 100, "", "a photo of a cat"]
    ids = tokenizer(prompts)
    assert ids.shape == (3, 3, 77) and ids.dtype == torch.int64
    assert (ids[:, :, 0] == START_ID).all()
    assert ids[0, :, 1:76].flatten()[:200].tolist() == tokenizer.tokenize("cat dog") * 100
    assert (ids[0, :2, 76] == END_ID).all() and (ids[0, 2, 51:] == END_ID).all()
    assert ids[1].tolist() == [TOKENS[""]] * 3
    assert ids[2].tolist() == [TOKENS["a photo of a cat"], TOKENS[""], TOKENS[""]]


@pytest.mark.parametrize(("words", "chunks"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunk_boundaries(tokenizer, words, chunks):
    assert tokenizer(["cat " * words]).shape == (1, chunks, 77)


def test_shorter_chunks(tokenizer):
    a, b, c = tokenizer.tokenize("red blue green")
    chunks = [[START_ID, a, b, END_ID], [START_ID, c, END_ID, END_ID]]
    assert tokenizer(["red blue green"], max_length=4).tolist() == [chunks]
    with pytest.raises(UserError, match="max_length 2"):
        tokenizer(["a"], max_length=2)


def test_odd_input(tokenizer):
    assert tokenizer([]).shape == (0, 1, 77)
    assert tokenizer.tokenize("cat\ud83d") == tokenizer.tokenize("cat?")
    assert tokenizer.tokenize("cafe\u0301") == tokenizer.tokenize("caf\u00e9")
    assert tokenizer.tokenize(f"cat{END}dog") == [*tokenizer.tokenize("cat"), END_ID, *tokenizer.tokenize("dog")]
    assert len(tokenizer.tokenize("\x00")) > 0
    for wrong in ("a cat", ["a cat", None]):
        with pytest.raises(UserError, match="expected a list of texts"):
            tokenizer(wrong)


# --- tokenizer folders ---


def write_folder(folder: Path, **more: dict) -> Path:
    merges = read_bundled_merges()
    (folder / "vocab.json").write_text(json.dumps(build_vocabulary(merges)), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in more.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_folder_like_sd15(tokenizer, tmp_path):
    pad = {"pad_token": {"content": END, "normalized": True}}
    loaded = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=pad))
    assert torch.equal(loaded(list(TOKENS)), tokenizer(list(TOKENS)))


def test_folder_with_added_token_and_other_padding(tokenizer, tmp_path):
    folder = write_folder(tmp_path, added_tokens={"<style>": 49408}, tokenizer_config={"pad_token": "!"})
    loaded = Tokenizer.from_folder(folder)
    cat, hat = tokenizer.tokenize("cat hat")
    assert loaded.vocab_size == 49409
    assert loaded(["cat <style> hat"], max_length=7).tolist() == [[[START_ID, cat, 49408, hat, END_ID, 0, 0]]]


def test_folder_with_tokenizer_json_alone(tokenizer, tmp_path):
    merges = read_bundled_merges()
    content = {
        "model": {"vocab": build_vocabulary(merges), "merges": merges},
        "added_tokens": [{"content": START, "id": START_ID}, {"content": END, "id": END_ID}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert torch.equal(Tokenizer.from_folder(tmp_path)(list(TOKENS)), tokenizer(list(TOKENS)))


def test_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match="without a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, added_tokens={"<style>": 50000})
    with pytest.raises(UserError, match="<style> with id 50000, expected 49408"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    with pytest.raises(UserError, match="of tokens the vocabulary lacks"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected two tokens"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("<html>", encoding="utf-8")
    with pytest.raises(UserError, match="vocab.json with broken content"):
        Tokenizer.from_folder(tmp_path)


# --- encoder ---


def test_last_hidden_state_matches_the_official_one(nano):
    expected = load_file(GOLDEN / "nano/expected.safetensors")
    with torch.inference_mode():
        states = nano(expected["input.token_ids"])
    assert states.shape == expected["text.last_hidden_state"].shape
    assert (states - expected["text.last_hidden_state"]).abs().max() < 1e-5


def test_encode_joins_chunks(nano, tokenizer):
    ids = tokenizer(["cat " * 100, "a dog"])
    with torch.inference_mode():
        context = nano.encode(ids)
        assert context.shape == (2, 154, 40)
        assert torch.allclose(context[1, 77:], nano(ids[1, 1:])[0], atol=1e-5)
        assert torch.allclose(context[0, :77], nano(ids[0, :1])[0], atol=1e-5)


def test_clip_skip_leaves_out_the_last_layers(nano, nano_weights, tokenizer):
    ids = tokenizer(["a red circle"])
    shallow = {key: tensor for key, tensor in nano_weights.items() if ".layers.1." not in key}
    one_layer = load_nano(shallow, TextConfig(width=40, layers=1, num_heads=4, mlp_width=80))
    with torch.inference_mode():
        assert torch.allclose(nano.encode(ids, clip_skip=2), one_layer.encode(ids), atol=1e-6)
        assert torch.equal(nano.encode(ids, clip_skip=1), nano.encode(ids))
    for wrong in (0, 3):
        with pytest.raises(UserError, match=f"clip_skip: got {wrong}, expected 1 .the last layer. to 2"):
            nano.encode(ids, clip_skip=wrong)


def test_attention_is_causal(nano, tokenizer):
    ids = tokenizer(["a red circle", "a red square"])[:, 0]
    with torch.inference_mode():
        states = nano(ids)
    assert torch.allclose(states[0, :3], states[1, :3], atol=1e-6)
    assert (states[0, 3:] - states[1, 3:]).abs().amax(-1).min() > 1e-3


def test_state_dict_round_trip(nano, nano_weights):
    state = nano.state_dict()
    assert state.keys() == nano_weights.keys()
    other = TextEncoder(NANO).eval()
    other.load_state_dict(state)
    ids = torch.randint(0, 49408, (1, 77), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(ids), nano(ids))
    with pytest.raises(RuntimeError, match="Missing key.*final_layer_norm.bias"):
        other.load_state_dict({k: v for k, v in state.items() if not k.endswith("final_layer_norm.bias")})


def test_meta_build_leaves_nothing_behind(nano):
    assert list(nano.buffers()) == []
    assert all(parameter.device.type == "cpu" for parameter in nano.parameters())


def test_sd15_size():
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig())
    assert len(encoder.state_dict()) == 196
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 123_060_480


def test_linear_layers_have_checkpoint_names(nano):
    layers = nano.linear_layers()
    assert len(layers) == 2 * 6
    layer = layers["text_model.encoder.layers.0.self_attn.q_proj"]
    assert layer is nano.get_submodule("text_model.encoder.layers.0.self_attn.q_proj")
    assert layer.weight is nano.get_parameter("text_model.encoder.layers.0.self_attn.q_proj.weight")


def test_encoder_mistakes(nano):
    with pytest.raises(UserError, match="got 78 tokens, expected at most 77"):
        nano(torch.zeros(1, 78, dtype=torch.int64))
    for heads in (0, 3):
        with pytest.raises(UserError, match=f"got {heads} heads for a text encoder of width 40"):
            TextEncoder(TextConfig(width=40, num_heads=heads))


def test_building_and_encoding_stay_offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("tried to connect")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    encoder = TextEncoder(TextConfig(width=8, layers=1, num_heads=1, mlp_width=8))
    assert encoder.encode(Tokenizer()(["a cat"])).shape == (1, 77, 8)


@pytest.mark.slow
def test_a_fresh_process_prints_nothing():
    code = (
        "from animatediff.models.text import TextConfig, TextEncoder, Tokenizer\n"
        "TextEncoder(TextConfig(width=8, layers=1, num_heads=1, mlp_width=8)).encode(Tokenizer()(['a cat']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
