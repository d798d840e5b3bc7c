"""What prompts can say, from a config to the clip: keyframes, weights, words of textual inversions."""

from pathlib import Path

import pytest
import torch

from animatediff.checkpoints.files import file_sha256
from animatediff.config.prompt_yaml import load_config
from animatediff.features.noise import seeded
from animatediff.media.video import read_metadata
from animatediff.models.tokenizer import Tokenizer
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.prompts import encode_prompts
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from animatediff.world.read import score_clip
from tests.checkpoints.synthetic import ldm_tensors, write
from tests.nano import entry, flat, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def embedding(nano, tmp_path_factory) -> Path:
    """A word of two vectors, those of "red fox"."""
    table = ldm_tensors()["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    vectors = {"emb_params": table[Tokenizer().tokenize("red fox")]}
    return write(tmp_path_factory.mktemp("embeddings") / "vixen.safetensors", vectors)


def encode(pipeline, prompt, negative_prompt, **options):
    """Contexts of prompts and negative prompts for two frames."""
    given = {"prompt": prompt, "negative_prompt": negative_prompt, "num_frames": 2, **options}
    return encode_prompts(pipeline.model, pipeline.request_for(given))


@pytest.mark.slow
def test_a_travelling_prompt_turns_red_into_blue():
    """The bundled model: red at the first frame, blue at the last."""
    pipeline = AnimateDiffPipeline.from_config(ROOT / "configs/animate/travel.yaml", device="cpu")
    (prompt,) = load_config(ROOT / "configs/animate/travel.yaml").entries[0].prompts.prompt
    (clip,) = pipeline(
        prompt, 16, num_inference_steps=4, guidance_scale=3, generator=seeded(42), output_type="pt"
    ).frames
    colors = [score_clip(2 * frame.expand(16, -1, -1, -1) - 1).color for frame in clip[[0, 15]]]
    assert colors == ["red", "blue"]


def test_words_of_a_config(nano, embedding, pipeline, tmp_path):
    """Everything at once; the clip says what made it, and the network is told what the words stand for."""
    values = {
        "prompt": [{0: "a vixen", 1: "(snow:1.5)"}],
        "n_prompt": "vixen",
        "tail_prompt": "at night",
        "embeddings": [str(embedding)],
        "prompt_weighting": True,
        "clip_skip": 2,
    }
    config = load_config(write_config(tmp_path / "words.yaml", entry(nano, **values)))
    folder = animate(config, output_dir=tmp_path / "out", device="cpu")
    settings = flat(read_metadata(folder / "sample/0-a-vixen-at-night.gif"))
    assert settings["prompt"] == {"0": "a vixen, at night", "1": "(snow:1.5), at night"}
    assert settings["clip_skip"] == 2 and settings["prompt_weighting"]
    assert settings["embeddings[0].path"] == {"path": str(embedding), "sha256": file_sha256(embedding)}
    assert load_config(folder / "config.yaml").entries[0].prompts == config.entries[0].prompts

    taught = AnimateDiffPipeline.from_config(tmp_path / "words.yaml", device="cpu")
    assert any("vixen" in line for line in taught.model.reports)
    context, negative = encode(taught, {0: "a vixen", 1: "(snow:1.5)"}, "vixen")
    expected = encode(pipeline, ["a red fox", "(snow:1.5)"], "red fox", prompt_weighting=True, clip_skip=2)
    assert torch.allclose(context.at(torch.arange(2))[0], expected[0], atol=1e-5)
    assert torch.allclose(negative.at(torch.arange(1))[0], expected[1][:1], atol=1e-5)


def test_words_are_taught_to_a_pipeline(nano, embedding):
    pipeline = AnimateDiffPipeline.from_config(write_config(nano / "taught.yaml", entry(nano)), device="cpu")
    pipeline.load_textual_inversion(embedding, token="<v>")
    taught, _ = encode(pipeline, ["<v>", "red fox"], None, guidance_scale=1.0)
    assert torch.equal(taught[0], taught[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_fixed_ratio": 1}, "prompt_fixed_ratio: got 1, expected less than 1"),
        ({"embeddings": ["nothere.pt"]}, r"entry x: embeddings\[0\].path: there is no nothere.pt"),
        ({"embeddings": ["kohya.safetensors"]}, "this is a LoRA of an image model, not a textual inversion"),
    ],
)
def test_mistakes_are_named(nano, make_entry, values, message, monkeypatch):
    monkeypatch.chdir(nano)
    with pytest.raises(UserError, match=message):
        check_requests([make_entry(name="x", **values)])
