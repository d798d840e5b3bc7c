"""SDXL as single files and folders: the way from one to the other and back, and what the files leave open."""

from pathlib import Path

import pytest
import torch

from animatediff.checkpoints.export import write_diffusers, write_ldm, write_motion_adapter, write_official_motion
from animatediff.checkpoints.files import read_json, read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.keymaps import LDM_UNET
from animatediff.checkpoints.load import load_base, load_personalised, load_vae
from animatediff.checkpoints.parts import read_image_parts, read_motion_parts
from animatediff.checkpoints.sizes import unet_config
from animatediff.config.prompt_yaml import load_config
from animatediff.pipeline.headers import check_requests
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, write
from tests.models.test_golden import assert_close
from tests.sdxl import GOLDEN, METADATA, MOTION, TABLES, checkpoint, motion, refiner

SKIPPED = ("position_ids", "denoiser.sigmas", "logit_scale")


@pytest.fixture(scope="module")
def single_file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors", checkpoint(), **METADATA)


@pytest.fixture(scope="module")
def folder(single_file, tmp_path_factory) -> Path:
    return write_diffusers(read_image_parts(single_file), tmp_path_factory.mktemp("diffusers") / "model")


def test_a_single_file_comes_back_from_a_folder_bit_by_bit(single_file, folder, tmp_path):
    back = read_state_dict(write_ldm(read_image_parts(folder), tmp_path / "back.safetensors"))
    assert equal(back.tensors, {key: t for key, t in checkpoint().items() if not key.endswith(SKIPPED)})
    parts = [read_image_parts(path) for path in (single_file, folder, tmp_path / "back.safetensors")]
    config, *others = [unet_config(part.unet, part.metadata) for part in parts]
    assert config.num_transformer_blocks == (0, 2, 3) and config.head_dim == 8
    assert others == [config, config]


def test_a_folder_is_what_it_is_in_diffusers(folder):
    info = identify(folder)
    assert (info.kind, info.base) == ("sdxl-checkpoint", "SDXL")
    parts = read_image_parts(folder)
    assert info.num_tensors == sum(map(len, (parts.unet, parts.vae, parts.text, parts.text_2)))
    assert read_json(folder / "model_index.json")["_class_name"] == "StableDiffusionXLPipeline"
    unet = read_json(folder / "unet" / "config.json")
    assert unet["attention_head_dim"] == [4, 8, 12] and unet["transformer_layers_per_block"] == [1, 2, 3]
    assert (unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]) == (16, 136)
    assert read_json(folder / "vae" / "config.json")["scaling_factor"] == 0.13025
    assert read_json(folder / "tokenizer_2" / "tokenizer_config.json")["pad_token"] == "!"


@torch.no_grad()
def test_transformers_opens_the_second_text_encoder(folder):
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").eval()
    out = model(GOLDEN["input.token_ids_2"], output_hidden_states=True)
    assert_close(out.hidden_states[-2], GOLDEN["text.2.penultimate"])
    assert_close(out.text_embeds, GOLDEN["text.2.pooled"])


def test_what_no_shape_tells_has_sdxls_defaults(tmp_path):
    """Heads of 64, the VAE's factor and the second encoder's activation; small widths allow no head of 64."""
    path = write(tmp_path / "x.safetensors", checkpoint(), num_heads="4")
    config = load_base(path)
    assert config.vae.config.scaling_factor == 0.13025
    assert (config.text_encoder.config.activation, config.text_encoder_2.config.activation) == ("quick_gelu", "gelu")
    with pytest.raises(UserError, match="got head_dim 64, expected a divisor of the widths 96"):
        load_base(write(tmp_path / "y.safetensors", checkpoint()))


@pytest.mark.parametrize(
    ("marker", "said"),
    [("v_pred", {"prediction_type": "v_prediction"}), ("ztsnr", {"rescale_betas_zero_snr": "true"})],
)
def test_markers_tell_how_a_model_was_trained(tmp_path, marker, said):
    parts = read_image_parts(write(tmp_path / "x.safetensors", checkpoint() | {marker: torch.zeros(0)}, **METADATA))
    assert said.items() <= parts.metadata.items()


def test_the_refiner_has_the_second_text_encoder_alone(tmp_path):
    path = write(tmp_path / "refiner.safetensors", refiner(), **METADATA)
    model = load_base(path)
    assert model.text_encoder is None and model.text_encoder_2.config.width == model.unet.config.context_dim == 40
    folder = write_diffusers(read_image_parts(path), tmp_path / "folder")
    assert read_json(folder / "unet" / "config.json")["addition_time_embed_dim"] == 16
    assert not (folder / "tokenizer").exists() and load_base(folder).unet.config == model.unet.config


def test_a_file_that_lacks_parts_takes_them_from_its_base(single_file, tmp_path):
    base = load_base(single_file)
    tensors = {key: t for key, t in checkpoint().items() if not key.startswith(("conditioner.", "first_stage_model."))}
    personal = load_personalised(write(tmp_path / "x.safetensors", tensors), base)
    assert personal.vae is base.vae and personal.text_encoder_2 is base.text_encoder_2
    assert personal.unet.config == base.unet.config
    assert "no second text encoder in it: the base model's is used" in str(personal.report)
    with pytest.raises(UserError, match="without a text encoder, expected a whole image model"):
        load_base(tmp_path / "x.safetensors")


@torch.no_grad()
def test_a_vae_that_overflows_in_half_precision_goes_on_in_float32(single_file):
    vae = load_base(single_file).vae
    latents = GOLDEN["input.latents"].movedim(1, 2)[:1, :1]
    for name in ("weight", "bias"):  # activations beyond float16's largest number, undone by the norm after them
        getattr(vae.decoder.up_blocks[-1].resnets[0].conv1, name).mul_(1e5)
    expected = vae.decode_video(latents)
    assert torch.isfinite(expected).all()
    assert_close(vae.half().decode_video(latents), expected, 0.05)
    assert vae.post_quant_conv.weight.dtype == torch.float32


def test_a_vae_of_sdxl_keeps_its_factor(single_file, tmp_path):
    image = load_base(single_file)
    vae, report = load_vae(single_file, image)
    assert vae.config == image.vae.config and "VAE alone is used" in str(report)
    own = {key: t for key, t in checkpoint().items() if key.startswith("first_stage_model.")}
    assert load_vae(write(tmp_path / "vae.safetensors", own), image)[0].config.scaling_factor == 0.13025


@pytest.mark.parametrize("names", ["diffusers", "LDM", "bare LDM"])
def test_a_unet_alone_is_a_personalised_model(single_file, folder, tmp_path, names):
    base, path = load_base(single_file), folder / "unet" / "diffusion_pytorch_model.safetensors"
    if names != "diffusers":
        unet = {key: t for key, t in checkpoint().items() if key.startswith(LDM_UNET)}
        bare = {key.removeprefix(LDM_UNET): t for key, t in unet.items()}
        path = write(tmp_path / "x.safetensors", bare if "bare" in names else unet)
    personal = load_personalised(path, base)
    assert personal.unet.config == base.unet.config and personal.text_encoder_2 is base.text_encoder_2
    assert equal(personal.unet.state_dict(), base.unet.state_dict())
    lines = f"pretrained_model_path: {single_file}\n{identify(path).config_line}\nprompt: a fox\n"
    config = tmp_path / "config.yaml"
    config.write_text(lines, encoding="utf-8")
    (checked,) = check_requests(load_config(config).entries)
    assert checked.headers.sdxl and checked.headers.image.path == path


def test_hotshots_folder_is_an_image_model_with_a_motion_module_in_it(single_file, folder, tmp_path):
    hotshot = tmp_path / "Hotshot-XL"
    (hotshot / "unet").mkdir(parents=True)
    for part in folder.iterdir():
        if part.name != "unet":
            (hotshot / part.name).symlink_to(part)
    (hotshot / "unet/config.json").write_text((folder / "unet/config.json").read_text())
    unet = read_state_dict(folder / "unet/diffusion_pytorch_model.safetensors").tensors
    write(hotshot / "unet/diffusion_pytorch_model.safetensors", unet | motion("hotshot-xl"))
    info = identify(hotshot)
    assert (info.kind, info.version, info.base) == ("sdxl-checkpoint", None, "SDXL")
    parts = read_image_parts(hotshot)
    assert (
        equal(parts.unet, unet) and parts.kind == "sdxl-checkpoint" and len(parts.unused) == len(motion("hotshot-xl"))
    )
    assert identify(hotshot / "unet").version == "hotshot-xl"
    assert equal(
        read_motion_parts(hotshot / "unet").tensors,
        read_motion_parts(write(tmp_path / "x.pt", motion("hotshot-xl"))).tensors,
    )


@pytest.mark.parametrize("version", MOTION)
def test_motion_modules_convert_and_come_back(tmp_path, version):
    """Hotshot-XL's spelling becomes the official one; diffusers' adapter has the names of the published one."""
    parts = read_motion_parts(write(tmp_path / "published.safetensors", motion(version)))
    official = read_state_dict(write_official_motion(parts, tmp_path / "official.safetensors"))
    assert official.metadata["version"] == version and len(official.tensors) == 420
    again = read_motion_parts(tmp_path / "official.safetensors")
    assert equal(again.tensors, parts.tensors) and identify(tmp_path / "official.safetensors").version == version
    adapter = write_motion_adapter(parts, tmp_path / "adapter")
    names = read_state_dict(adapter / "diffusion_pytorch_model.safetensors").tensors.keys()
    assert names == TABLES["motion_module"]["sdxl-beta-diffusers"].keys()
    assert identify(adapter).version == version
    base = {"block_out_channels": [32, 64, 96], "use_motion_mid_block": False}
    assert base.items() <= read_json(adapter / "config.json").items()


def test_an_adapter_without_our_metadata_has_to_be_named(tmp_path):
    tables = {key: torch.zeros(shape) for key, shape in TABLES["motion_module"]["sdxl-beta-diffusers"].items()}
    info = identify(write(tmp_path / "x.safetensors", tables))
    assert (info.kind, info.version) == ("motion-adapter", None)
    assert "version: hotshot-xl or sdxl-beta" in info.config_line
