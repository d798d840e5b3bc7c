"""SDXL and its two motion modules against numbers that the official implementations produced."""

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange

from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module
from animatediff.checkpoints.lora_files import read_lora
from animatediff.models.lora import LoRAStack
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.unet import UNet
from tests.models.test_golden import assert_close
from tests.sdxl import FOLDER, GOLDEN, MOTION, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def base(files) -> ImageModel:
    return load_base(files / "sdxl.safetensors")


@pytest.fixture(scope="module")
def unets(files, base) -> dict[str, UNet]:
    return {version: load_motion_module(base.unet, files / f"{version}.safetensors")[0] for version in MOTION}


def golden(name: str) -> torch.Tensor:
    """An expected video, (b, c, f, h, w) in the file, as (b, f, c, h, w)."""
    return rearrange(GOLDEN[name], "b c f h w -> b f c h w")


@torch.no_grad()
def predict(unet: UNet, latents: str, t: int) -> torch.Tensor:
    conditioning = {"pooled": GOLDEN["text.2.pooled"], "time_ids": GOLDEN["input.time_ids"]}
    return unet(golden(latents), torch.tensor([t, t]), GOLDEN["text.context"], **conditioning)


@pytest.mark.parametrize("t", [1, 481, 981])
def test_image_model(base, t):
    assert_close(predict(base.unet, "input.latents", t), golden(f"unet.image.t{t}"))


def test_sizes_that_are_no_multiple_of_the_downsampling(base):
    assert_close(predict(base.unet, "input.odd_latents", 481), golden("unet.image_odd.t481"))


@pytest.mark.parametrize("t", [1, 481, 981])
def test_video_models(unets, t):
    assert_close(predict(unets["sdxl-beta"], "input.latents", t), golden(f"unet.beta.t{t}"))
    assert_close(predict(unets["hotshot-xl"], "input.hotshot_latents", t), golden(f"unet.hotshot.t{t}"))


@torch.no_grad()
@pytest.mark.parametrize("version", MOTION)
def test_pooled_text_may_differ_from_frame_to_frame(base, unets, version):
    x, context, t = golden("input.latents")[:1, :3], GOLDEN["text.context"][:1], torch.tensor([481])
    conditioning = {"time_ids": GOLDEN["input.time_ids"][:1]}
    same = GOLDEN["text.2.pooled"][:1]
    expected = unets[version](x, t, context, pooled=same, **conditioning)
    assert_close(unets[version](x, t, context, pooled=same[:, None].expand(-1, 3, -1), **conditioning), expected)
    other = torch.stack([same, same, GOLDEN["text.2.pooled"][1:]], dim=1)
    before, after = (base.unet(x, t, context, pooled=pooled, **conditioning) for pooled in (same, other))
    assert_close(after[:, :2], before[:, :2])
    assert (after[:, 2] - before[:, 2]).norm() > 0.01 * before[:, 2].norm()


@torch.no_grad()
def test_hotshot_leaves_a_single_frame_to_the_image_model(unets):
    x = golden("input.hotshot_latents")[:, :1]
    conditioning = {"pooled": GOLDEN["text.2.pooled"], "time_ids": GOLDEN["input.time_ids"]}
    got = unets["hotshot-xl"](x, torch.tensor([481, 481]), GOLDEN["text.context"], **conditioning)
    assert_close(got, golden("unet.hotshot_one_frame.t481"))


@torch.no_grad()
def test_vae(base):
    mean, logvar = base.vae.encode(GOLDEN["input.image"])
    assert_close(mean, GOLDEN["vae.mean"])
    assert_close(logvar, GOLDEN["vae.logvar"])
    latents = golden("input.latents")[:, :1]
    assert_close(base.vae.decode(latents[:, 0]), GOLDEN["vae.decode"])
    assert_close(base.vae.decode_video(latents)[:, 0], GOLDEN["vae.decode_scaled"].clamp(-1, 1))


@torch.no_grad()
def test_text_encoders(base):
    ids_1, ids_2 = GOLDEN["input.token_ids_1"], GOLDEN["input.token_ids_2"]
    assert_close(base.text_encoder(ids_1), GOLDEN["text.1.last_hidden_state"])
    assert_close(base.text_encoder(ids_1, clip_skip=2, final_norm=False), GOLDEN["text.1.penultimate"])
    states = base.text_encoder_2.hidden_states(ids_2)
    assert_close(states[-2], GOLDEN["text.2.penultimate"])
    assert_close(base.text_encoder_2.pool(states[-1], ids_2), GOLDEN["text.2.pooled"])


def test_token_ids():
    """The second tokenizer pads with `!`, which stays a word of its own in a prompt, as in OpenCLIP and the web UIs."""
    expected = json.loads((FOLDER / "tokens.json").read_text(encoding="utf-8"))
    first, second = Tokenizer(), Tokenizer(pad_token="!")
    for prompt, ids in expected.items():
        assert first([prompt])[0, 0].tolist() == ids["1"], prompt
        if "<|" not in prompt:  # special tokens written out: text to OpenCLIP, themselves to us and transformers
            assert second([prompt])[0, 0].tolist() == ids["2_open_clip"], prompt


@torch.no_grad()
def test_kohya_lora_of_all_three_networks(files, base):
    lora = read_lora(files / "kohya.safetensors")
    stack = LoRAStack(base.unet, base.text_encoder, base.text_encoder_2)
    report = stack.add(lora, 0.6)
    assert not report.unused
    stack.merge()
    ids_1, ids_2 = GOLDEN["input.token_ids_1"], GOLDEN["input.token_ids_2"]
    states = base.text_encoder_2.hidden_states(ids_2)
    got = {
        "text.1.penultimate": base.text_encoder(ids_1, clip_skip=2, final_norm=False),
        "text.2.penultimate": states[-2],
        "text.2.pooled": base.text_encoder_2.pool(states[-1], ids_2),
    }
    for name, states in got.items():
        assert_close(states, GOLDEN[f"lora.kohya_a0.6.{name}"])
    assert_close(predict(base.unet, "input.latents", 481), golden("lora.kohya_a0.6.unet.image"))
    stack.clear()
    assert_close(predict(base.unet, "input.latents", 481), golden("unet.image.t481"))
