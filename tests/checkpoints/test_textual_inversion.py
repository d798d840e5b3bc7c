"""Textual inversions of every format mean the same, and a word is its vectors wherever it stands."""

from dataclasses import replace

import pytest
import torch

from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.textual_inversion import load_textual_inversion
from animatediff.config.networks import TextConfig
from animatediff.models.prompt_weighting import parse_prompt
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import END, Tokenizer
from animatediff.models.twins import share_weights
from animatediff.utils import UserError
from tests.checkpoints.synthetic import ldm_tensors, write

WIDTH = 40
TABLE = ldm_tensors()["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]


@pytest.fixture
def text(base):
    """An encoder and a tokenizer that may be taught words."""
    return share_weights(base.text_encoder), Tokenizer()


def vectors_of(prompt: str) -> torch.Tensor:
    return TABLE[Tokenizer().tokenize(prompt)]


def encode(text, *prompts: str) -> torch.Tensor:
    encoder, tokenizer = text
    with torch.no_grad():
        return encoder.encode(tokenizer(list(prompts)))


FOX = vectors_of("red fox")
FILES = {
    "web ui.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": FOX}, "name": "other", "step": 7},
    "original.pt": {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(FOX)}),
    },
    "diffusers.bin": {"<my-fox>": FOX},
    "trainer.safetensors": {"emb_params": FOX},
    "half.safetensors": {"emb_params": FOX.half()},
}


@pytest.mark.parametrize("name", FILES)
def test_every_format(name, text, base, tmp_path):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        write(path, FILES[name])
    else:
        torch.save(FILES[name], path)
    assert identify(path).kind == "textual-inversion" and identify(path).config_line == f"embeddings: [{path}]"
    report = str(load_textual_inversion(path, *text))
    assert "2 vectors, in prompts as " + path.stem in report
    taught = encode(text, f"a {path.stem.upper()}, running", "snow")
    tolerance = 1e-2 if "half" in name else 0
    assert torch.allclose(
        taught, encode((base.text_encoder, Tokenizer()), "a red fox, running", "snow"), atol=tolerance
    )
    if name == "diffusers.bin":
        assert torch.equal(encode(text, "a <my-fox>, running", "snow"), taught)


def test_a_name_of_ones_own(text, tmp_path):
    path = write(tmp_path / "learned.safetensors", {"<my-fox>": FOX[0]})
    load_textual_inversion(path, *text, name="vixen")
    red = encode(text, "a red den")
    assert torch.equal(encode(text, "a vixen den"), red)
    for untaught in ("a learned den", "a <my-fox> den", "a vixens den"):
        assert not torch.allclose(encode(text, untaught), red, atol=1e-3)
    assert encode(text, "a (vixen) den").shape == (1, 77, WIDTH)


def test_several_vectors_share_a_chunk(text, tmp_path):
    """They are never cut in two, except where no chunk could hold them; weights reach all of them."""
    _, tokenizer = text
    five, long = torch.randn(5, WIDTH), torch.randn(80, WIDTH)
    load_textual_inversion(write(tmp_path / "five.safetensors", {"emb_params": five}), *text)
    load_textual_inversion(write(tmp_path / "long.safetensors", {"emb_params": long}), *text)
    known, cat = len(TABLE), tokenizer.tokenize("cat")
    ids = tokenizer(["cat " * 70 + "five", "cat " * 71 + "five", "cat long"])
    assert ids[0, 0, 71:76].tolist() == [*range(known, known + 5)]
    assert (
        ids[1, 0, 71:73].tolist() == [*cat, tokenizer.end_id] and ids[1, 1, 1:6].tolist() == ids[0, 0, 71:76].tolist()
    )
    assert ids.shape[1] == 3 and ids[2, 1, 1:76].tolist() + ids[2, 2, 1:6].tolist() == [*range(known + 5, known + 85)]
    weights = tokenizer.weighted([parse_prompt("cat (five:1.5)")])[1]
    assert weights[0, 0, :9].tolist() == [1, 1, *[1.5] * 5, 1, 1]


def test_the_longest_word_counts(text):
    _, tokenizer = text
    tokenizer.add_word("bad", [1])
    tokenizer.add_word("bad-hands", [2, 3])
    assert tokenizer.tokenize("Bad-Hands bad") == [2, 3, 1]
    assert tokenizer.tokenize("badly") == Tokenizer().tokenize("badly")


def test_the_model_it_was_made_from_stays(base, text, tmp_path):
    load_textual_inversion(write(tmp_path / "fox.safetensors", {"emb_params": FOX}), *text)
    assert text[0].config.vocab_size == base.text_encoder.config.vocab_size + 2
    assert len(base.text_encoder.text_model.embeddings.token_embedding.weight) == len(TABLE)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.zeros(2, 768)}, "got vectors of 768 numbers, expected 40 as the text encoder has"),
        (
            {"emb_params": torch.zeros(2, 1024)},
            "this is a textual inversion for SD 2.x, not a textual inversion for SD 1.x or SDXL",
        ),
        (
            {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
            "got a textual inversion for SDXL with an SD 1.x base",
        ),
        (
            {"lora_unet_conv_in.lora_down.weight": torch.zeros(4, 8)},
            "this is a LoRA of an image model, not a textual inversion",
        ),
    ],
)
def test_mistakes_are_named(tensors, message, text, tmp_path):
    with pytest.raises(UserError, match=message):
        load_textual_inversion(write(tmp_path / "x.safetensors", tensors), *text)


def test_a_word_is_taught_once(text, tmp_path):
    path = write(tmp_path / "fox.safetensors", {"emb_params": FOX})
    load_textual_inversion(path, *text)
    with pytest.raises(UserError, match="got the word 'FOX' twice, expected one of its own: give it a name"):
        load_textual_inversion(path, *text, name="FOX")


def test_sdxl_has_a_vector_for_each_of_its_text_encoders(tmp_path):
    config = TextConfig(width=24, layers=1, num_heads=2, mlp_width=8)
    encoders = [TextEncoder(config), TextEncoder(replace(config, width=40))]
    first, second = ((encoder, Tokenizer(pad_token=pad)) for encoder, pad in zip(encoders, (END, "!"), strict=True))
    fox = Tokenizer().tokenize("red fox")
    vectors = {
        key: encoder.text_model.embeddings.token_embedding.weight[fox].detach()
        for key, encoder in zip(("clip_l", "clip_g"), encoders, strict=True)
    }
    path = write(tmp_path / "vixen.safetensors", vectors)
    expected = [encode(pair, "a red fox, running") for pair in (first, second)]
    assert "2 vectors, in prompts as vixen" in str(load_textual_inversion(path, *first, second=second))
    for pair, states in zip((first, second), expected, strict=True):
        assert torch.equal(encode(pair, "a vixen, running"), states)
    with pytest.raises(UserError, match="got a textual inversion for SDXL with an SD 1.x base"):
        load_textual_inversion(path, *first)
    with pytest.raises(UserError, match="for SD 1.x with an SDXL base"):
        load_textual_inversion(write(tmp_path / "x.safetensors", {"emb_params": FOX}), *first, second=second)
    with pytest.raises(UserError, match="expected as many of clip_l and clip_g"):
        uneven = vectors | {"clip_g": vectors["clip_g"][:1]}
        load_textual_inversion(write(tmp_path / "y.safetensors", uneven), *first, second=second)
