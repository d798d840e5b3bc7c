"""CLIP metrics: known vectors, a local CLIP against transformers itself, and the toy data set's own encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.metrics.clip_metrics import domain_similarity, frame_consistency, measure_clip, text_alignment
from animatediff.metrics.encoders import MEAN, STD, LocalCLIP
from animatediff.metrics.references import cover, find_pictures, read_pictures, signed
from animatediff.models.tokenizer import Tokenizer
from animatediff.utils import UserError
from animatediff.world.encoder import load_encoder, matches
from animatediff.world.shapes import make_scene
from tests.tiny_clip import write_clip


def test_known_vectors():
    x, y = torch.eye(2)
    frames = torch.stack([x, x, y, y])
    assert text_alignment(frames, -x) == -50
    assert domain_similarity(frames, torch.stack([x, x, x, y])) == 50
    assert frame_consistency(frames) == pytest.approx(200 / 3)
    with pytest.raises(UserError, match="got 1 frames, expected at least two"):
        frame_consistency(frames[:1])


class Brightness:
    """Dark pictures and "dark" are one direction, bright ones and everything else the other."""

    name = "brightness"

    def encode_images(self, images):
        return torch.eye(2)[(images.mean(dim=(1, 2, 3)) > 0).long()]

    def encode_texts(self, texts):
        return torch.eye(2)[[int(text != "dark") for text in texts]]


def test_a_clip():
    video = torch.tensor([-0.9, -0.8, 0.9, -0.7])[:, None, None, None].expand(4, 3, 8, 8)
    metrics = measure_clip(video, Brightness(), prompt="dark", references=torch.eye(2)[:1])
    assert vars(metrics) == {
        "text_alignment": 75.0,
        "domain_similarity": 75.0,
        "frame_consistency": pytest.approx(100 / 3),
    }
    assert set(vars(measure_clip(video[:1], Brightness())).values()) == {None}


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (20, 20)])
def test_pictures_are_resized_as_clip_was_trained(size):
    pixels = np.random.default_rng(0).integers(60, 196, (*size, 3), dtype=np.uint8)  # Pillow clips between two passes
    scale = 32 / min(size)
    width, height = int(size[1] * scale), int(size[0] * scale)
    small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    top, left = (height - 32) // 2, (width - 32) // 2
    got = (cover(signed(torch.from_numpy(pixels).permute(2, 0, 1)[None]), 32)[0] + 1) * 127.5
    assert np.abs(got.permute(1, 2, 0).numpy() - small[top : top + 32, left : left + 32]).max() < 1.5


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_a_local_clip_is_what_transformers_computes(clip_folder):
    from transformers import CLIPModel

    encoder = load_encoder(str(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder, local_files_only=True).eval()
    images, texts = torch.rand(3, 3, 32, 32).mul(255).round(), ["a fox", "a longer text about an owl"]
    pixels = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = model(input_ids=Tokenizer()(texts)[:, 0], pixel_values=pixels)
    assert torch.allclose(encoder.encode_images(images / 127.5 - 1), expected.image_embeds, atol=1e-5)
    assert torch.allclose(encoder.encode_texts(texts), expected.text_embeds, atol=1e-5)
    assert torch.equal(LocalCLIP(clip_folder / "model.safetensors").encode_texts(texts), encoder.encode_texts(texts))


def test_long_texts_are_cut_and_wrong_end_tokens_forgiven(clip_folder, tmp_path):
    """Released configs name the end token 2, which transformers takes for the token with the highest id."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    encoder, text = LocalCLIP(tmp_path), "red fox " * 50
    assert torch.equal(encoder.encode_texts([text]), LocalCLIP(clip_folder).encode_texts([text]))
    assert torch.equal(encoder.encode_texts([text]), encoder.encode_texts([text + "in the snow"]))
    image = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(encoder.encode_images(image), LocalCLIP(clip_folder).encode_images(image), atol=1e-3)


def test_what_is_no_clip(clip_folder, tmp_path):
    with pytest.raises(UserError, match="got --clip nowhere, which does not exist: give world or a local CLIP"):
        load_encoder("nowhere")
    with pytest.raises(UserError, match="without weights, expected model.safetensors"):
        load_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="got no config.json in"):
        load_encoder(str(tmp_path))
    config = json.loads((clip_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(UserError, match="of a 'siglip' model, expected 'clip'"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 7}))
    with pytest.raises(UserError, match=r"does not fit .*config\.json \(visual_projection\.weight\)"):
        load_encoder(str(tmp_path))


def test_reference_pictures(tmp_path):
    (tmp_path / "a").mkdir()
    for name, size in (("b.png", (6, 4)), ("a/c.JPG", (5, 5)), ("d.gif", (3, 3))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / name, format=None if name[-1] != "G" else "JPEG")
    (tmp_path / "notes.txt").write_text("hello")
    found = find_pictures([tmp_path, tmp_path / "b.png"])
    assert [path.name for path in found] == ["c.JPG", "b.png", "d.gif"]
    assert [tuple(read_pictures(path).shape) for path in found] == [(1, 3, 5, 5), (1, 3, 4, 6), (1, 3, 3, 3)]
    assert torch.equal(read_pictures(tmp_path / "b.png")[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    (tmp_path / "broken.png").write_text("hello")
    with pytest.raises(UserError, match="broken.png, expected a picture .*: it is none"):
        read_pictures(tmp_path / "broken.png")
    with pytest.raises(UserError, match=r"notes\.txt, expected a picture \(\.png"):
        find_pictures([tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="nowhere, which does not exist"):
        find_pictures([tmp_path / "nowhere"])


def test_which_captions_are_true_of_which_frames():
    given = {"shape": "star", "color": "red", "background": "white", "motion": "left"}
    scenes = [make_scene(i, seed=1, **given) for i in range(12)]
    said = torch.tensor([scene.size in scene.caption for scene in scenes])
    sizes = torch.tensor([scene.size == "large" for scene in scenes])
    true = matches(scenes)
    assert 0 < said.sum() < 12 and true[~said].all()
    assert torch.equal(true[said], sizes[said, None] == sizes)
    assert torch.equal(matches([make_scene(i, seed=1) for i in range(3)]), torch.eye(3, dtype=torch.bool))
