"""IP-Adapters against the numbers of diffusers and the original code."""

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.checkpoints.controlnet_files import load_controlnet
from animatediff.checkpoints.image_encoder_files import clip_pixels, load_image_encoder
from animatediff.checkpoints.ip_adapter_files import load_ip_adapter
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.config.networks import IPAdapterConfig
from animatediff.models.ip_adapter_network import (
    LAYER_PRESETS,
    ImagePrompt,
    IPAdapter,
    cross_attentions,
    image_prompted,
    layer_weights,
)
from animatediff.utils import UserError
from tests.checkpoints.synthetic import write
from tests.control import (
    CONFIG,
    EXPECTED,
    TABLES,
    controlnet_tensors,
    hint,
    ip_adapter_tensors,
    video,
    write_image_encoder,
)
from tests.models.test_golden import assert_close
from tests.nano import write_files

T = torch.tensor([481, 481])
CONTEXT = EXPECTED["input.context"]
VARIANTS = ("base", "plus", "full")
FRAMES = torch.arange(CONFIG["frames"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    write_image_encoder(folder / "image_encoder")
    for variant in VARIANTS:
        write(folder / f"{variant}.safetensors", ip_adapter_tensors(variant))
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder / "nano.safetensors")


@pytest.fixture(scope="module")
def adapters(folder, base):
    return {v: load_ip_adapter(folder / f"{v}.safetensors", base.unet)[0] for v in VARIANTS}


@pytest.fixture(scope="module")
def encoder(folder):
    return load_image_encoder(folder / "image_encoder")


def tokens(variant: str, *images: int) -> torch.Tensor:
    """(2 parts, 1, l, d): unconditional tokens, and those of images a (0) and b (1) in a row."""
    uncond, known = EXPECTED[f"ip.{variant}.uncond"], EXPECTED[f"ip.{variant}.tokens"]
    return torch.stack([uncond.repeat(1, len(images), 1), known[list(images)].flatten(0, 1)[None]])


def predict(unet, *prompts: tuple[ImagePrompt, float], scales: list[float] | None = None, **inputs) -> torch.Tensor:
    for prompt, scale in prompts:
        per_frame = scale * torch.tensor(scales or [1.0] * len(FRAMES))
        prompt.select(FRAMES, per_frame, (8, 16), levels=4)
    with torch.no_grad(), image_prompted(unet, [prompt for prompt, _ in prompts]):
        return unet(video("input.latents"), T, CONTEXT, **inputs)


def test_image_encoder(encoder):
    pictures = [Image.fromarray(EXPECTED[f"input.image_{name}"].numpy()) for name in "ab"]
    pixels = torch.cat([clip_pixels(picture, encoder.size) for picture in pictures])
    assert torch.equal(pixels, EXPECTED["clip.pixel_values"])
    assert_close(encoder.embeddings(pixels), EXPECTED["clip.image_embeds"])
    assert_close(encoder.hidden(pixels), EXPECTED["clip.hidden"])
    assert_close(encoder.hidden(torch.zeros_like(pixels[:1])), EXPECTED["clip.hidden_zero"])


def test_pictures_of_the_real_size():
    picture = Image.fromarray(EXPECTED["input.image_a"].numpy())
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    cropped = ((clip_pixels(picture, 224)[0] * std + mean) * 255).round().byte()
    assert torch.equal(cropped.permute(1, 2, 0), EXPECTED["clip.cropped_224"])
    wide = Image.fromarray(np.arange(200, dtype=np.uint8)[None].repeat(100, axis=0))
    level = lambda how: (clip_pixels(wide, 50, fit=how)[0] * std + mean)[0] * 255  # noqa: E731
    assert level("crop").min() > 45 and level("squash").min() < 5 and level("squash").max() > 195
    assert (level("pad")[0] < 1).all() and level("pad")[25].max() > 190


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens(adapters, encoder, variant):
    adapter, zeros = adapters[variant], torch.zeros_like(EXPECTED["clip.pixel_values"][:1])
    if variant == "base":
        features, nothing = encoder.embeddings(EXPECTED["clip.pixel_values"]), torch.zeros(1, encoder.embedding_width)
    else:
        features, nothing = encoder.hidden(EXPECTED["clip.pixel_values"]), encoder.hidden(zeros)
    assert_close(adapter(features), EXPECTED[f"ip.{variant}.tokens"])
    assert_close(adapter(nothing), EXPECTED[f"ip.{variant}.uncond"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_model(base, adapters, variant):
    assert_close(predict(base.unet), video("unet.image"))
    prompt = ImagePrompt(adapters[variant], tokens(variant, 0))
    assert_close(predict(base.unet, (prompt, 0.6)), video(f"ip.{variant}.unet_0.6"))
    assert_close(predict(base.unet, (prompt, 0.0)), video("unet.image"))
    assert_close(predict(base.unet), video("unet.image"))  # nothing stays


def test_several_pictures(base, adapters):
    adapter = adapters["base"]
    assert_close(predict(base.unet, (ImagePrompt(adapter, tokens("base", 0, 1)), 0.6)), video("ip.unet_two_images"))
    masked = [(ImagePrompt(adapter, tokens("base", i), mask=EXPECTED["input.masks"][i]), 0.6) for i in (0, 1)]
    assert_close(predict(base.unet, *masked), video("ip.unet_masks"))
    plus = ImagePrompt(adapters["plus"], tokens("plus", 1))
    both = predict(base.unet, (ImagePrompt(adapter, tokens("base", 0)), 0.6), (plus, 0.3))
    assert_close(both, video("ip.unet_base_and_plus"))


def test_pictures_that_change(base, adapters):
    a, b = EXPECTED["ip.base.tokens"]
    between = torch.stack([a + (b - a) * i / 4 for i in range(5)])
    travel = torch.stack([EXPECTED["ip.base.uncond"].expand(5, -1, -1), between])
    assert_close(predict(base.unet, (ImagePrompt(adapters["base"], travel), 0.6)), video("ip.unet_travel"))
    prompt = ImagePrompt(adapters["base"], tokens("base", 0))
    scaled = predict(base.unet, (prompt, 0.6), scales=CONFIG["frame_scales"])
    assert_close(scaled, video("ip.unet_frame_scales"))


def test_layers(base, adapters):
    weights = layer_weights(base.unet, CONFIG["layer_scales"])
    prompt = ImagePrompt(adapters["plus"], tokens("plus", 0), layers=weights)
    assert_close(predict(base.unet, (prompt, 1.0)), video("ip.unet_layers"))


def test_presets_name_the_layers_by_their_place_in_the_network(base):
    """In order of execution, which is how ComfyUI_IPAdapter_plus numbers them: down, middle, up."""
    names = list(cross_attentions(base.unet))
    assert names == [f"{e['module']}.transformer_blocks.0.attn2" for _, e in sorted(_layers().items())]
    executed = [*range(6), 15, *range(6, 15)]

    def weights(preset: str) -> dict[int, float]:
        found = layer_weights(base.unet, preset)
        return {t: found[i] for t, i in enumerate(executed) if found[i]}

    style = dict.fromkeys((0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15), 1.0)
    assert weights("all") == dict.fromkeys(range(16), 1.0)
    assert weights("style") == style
    assert weights("composition") == {4: 0.25, 5: 1.0}
    assert weights("style and composition") == style | {4: 0.25, 5: 1.0}
    assert weights("strong style") == dict.fromkeys((t for t in range(16) if t not in (4, 5)), 1.0)
    assert len(LAYER_PRESETS) == 5
    with pytest.raises(UserError, match="layers: got 'mid', expected .* such as down_blocks.0, .*mid_block"):
        layer_weights(base.unet, {"mid": 1.0})


def _layers() -> dict[int, dict[str, str]]:
    return {int(number): entry for number, entry in TABLES["ip_layers"].items()}


def test_video_model_and_a_controlnet_beside(folder, base, adapters):
    unet, _ = load_motion_module(base.unet, folder / "mm_v3.safetensors")
    prompt = ImagePrompt(adapters["base"], tokens("base", 0))
    assert_close(predict(unet, (prompt, 0.6)), video("ip.unet_v3"))
    net, _ = load_controlnet(write(folder / "control.safetensors", controlnet_tensors()), base.unet, base.vae)
    with torch.no_grad():
        down, mid = net(video("input.latents"), T, CONTEXT, net.embed(hint()))
    added = {"down_residuals": [0.8 * r for r in down], "mid_residual": 0.8 * mid}
    assert_close(predict(base.unet, (prompt, 0.6), **added), video("combo.image"))
    assert_close(predict(unet, (prompt, 0.6), **added), video("combo.v3"))


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (IPAdapterConfig(), 22.3),
        (IPAdapterConfig("plus", encoder_width=1280, tokens=16), 49.1),
        (IPAdapterConfig("full", encoder_width=1280), 21.8),
    ],
)
def test_sizes_of_the_released_files(config, millions):
    with torch.device("meta"):
        adapter = IPAdapter(config)
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == millions
    assert sum(p.numel() for p in adapter.ip_adapter.parameters()) == 19_169_280
