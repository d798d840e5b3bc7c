"""The text encoder against the official implementation's numbers and transformers'."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from animatediff.config.networks import TextConfig
from animatediff.models.attention import Attention
from animatediff.models.text import TextEncoder, equally_long
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError
from tests.golden.synthetic_weights import synthetic_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
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


def test_last_hidden_state_matches_the_official_one(nano):
    expected = load_file(GOLDEN / "nano/expected.safetensors")
    with torch.inference_mode():
        states = nano(expected["input.token_ids"])
    assert states.shape == expected["text.last_hidden_state"].shape
    assert (states - expected["text.last_hidden_state"]).abs().max() < 1e-5


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request):
    """Ours and transformers' encoder with the same random weights, an end token of 99 and a projection to 24."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=100, hidden_size=40, intermediate_size=80, projection_dim=24, num_hidden_layers=3,
            num_attention_heads=4, hidden_act=request.param, bos_token_id=98, eos_token_id=99, pad_token_id=99,
            attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    config = TextConfig(100, 40, 3, 4, 80, activation=request.param, projection_width=24, end_token_id=99)
    ours = TextEncoder(config).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    return ours, theirs


def test_the_numbers_are_transformers_to_the_bit(pair):
    """The same products in the same order: every layer, the final norm, the pooled vector, and the gradients."""
    ours, theirs = pair
    ids = torch.randint(0, 98, (3, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 40:] = 99
    ids[1, 20] = 99
    out = theirs(input_ids=ids, output_hidden_states=True)
    states = ours.hidden_states(ids)
    for got, expected in zip(states, out.hidden_states, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(ours(ids), out.last_hidden_state)
    assert torch.equal(ours(ids, clip_skip=2, final_norm=False), out.hidden_states[-2])
    assert torch.equal(ours.pool(states[-1], ids), out.text_embeds)
    for result in (out.text_embeds, ours.pool(states[-1], ids)):
        result.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name


def test_weights_begin_as_openai_s(nano):
    """By layer: the standard deviations of CLIP's initialization, and no biases."""
    torch.manual_seed(0)
    config = TextConfig(width=256, layers=3, num_heads=4, mlp_width=512)
    layer = TextEncoder(config).text_model.encoder.layers[1]
    inner = 256**-0.5 * 6**-0.5
    stds = {"self_attn.q_proj": inner, "self_attn.k_proj": inner, "self_attn.v_proj": inner, "mlp.fc2": inner}
    for name, std in (stds | {"self_attn.out_proj": 256**-0.5, "mlp.fc1": 512**-0.5}).items():
        linear = layer.get_submodule(name)
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)  # of 65,536 draws: 1 / sqrt(2 n) = 0.3 %
        assert not linear.bias.any()


def test_encode_joins_chunks(nano, tokenizer):
    ids = tokenizer(["cat " * 100, "a dog"])
    with torch.inference_mode():
        context = nano.encode(ids)
        assert context.shape == (2, 154, 40)
        assert torch.allclose(context[1, 77:], nano(ids[1, 1:])[0], atol=1e-5)
        assert torch.allclose(context[0, :77], nano(ids[0, :1])[0], atol=1e-5)


def test_equally_long_contexts_are_seen_as_they_are(nano, tokenizer):
    """Cross-attention to a repeated text is cross-attention to the text: a clip does not depend on its batch-mates."""
    with torch.inference_mode():
        texts = [nano.encode(tokenizer([prompt])) for prompt in ("a cat", "cat " * 100, "cat " * 200)]
        assert [text.shape[1] // 77 for text in texts] == [1, 2, 3]
        one, two, three = equally_long(texts)
        assert one.shape == two.shape == three.shape == (1, 6 * 77, 40)
        assert all(a is b or torch.equal(a, b) for a, b in zip(equally_long(texts[:1] * 2), texts[:1] * 2, strict=True))
        torch.manual_seed(0)
        attention, x = Attention(16, 2, context_dim=40), torch.randn(3, 5, 16)
        together = attention(x, torch.cat([one, two, three]))
        for row, (pixels, text) in enumerate(zip(x.split(1), texts, strict=True)):
            # of 462 terms in place of 77: rounding grows with the root of their number
            torch.testing.assert_close(together[row : row + 1], attention(pixels, text), rtol=1e-5, atol=1e-6)


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
    with pytest.raises(UserError, match="activation 'relu' of a text encoder, expected quick_gelu or gelu"):
        TextEncoder(TextConfig(activation="relu"))


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
        "from animatediff.config.networks import TextConfig\n"
        "from animatediff.models.text import TextEncoder\n"
        "from animatediff.models.tokenizer import Tokenizer\n"
        "TextEncoder(TextConfig(width=8, layers=1, num_heads=1, mlp_width=8)).encode(Tokenizer()(['a cat']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
