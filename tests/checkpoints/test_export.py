"""What is saved loads by itself; conversions are exact to the bit and readable by others."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from animatediff.checkpoints.export import (
    save_image_model,
    save_motion_module,
    write_diffusers,
    write_ldm,
    write_motion_adapter,
    write_official_motion,
)
from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.load import ImageModel, LoadReport, load_base, load_motion_module
from animatediff.checkpoints.parts import read_image_parts, read_motion_parts
from animatediff.config.networks import MotionConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.utils import UserError
from tests.checkpoints.synthetic import METADATA, equal, ldm_tensors, motion_tensors, with_positional, write

SCHEDULE = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": "true"}
GOLDEN_TOKENS = json.loads((Path(__file__).parents[1] / "golden/tokens.json").read_text(encoding="utf-8"))
SMALL = UNetConfig(
    block_out_channels=(16, 32, 48),
    attention_levels=(False, True, True),
    layers_per_block=1,
    context_dim=24,
    num_heads=4,
    norm_num_groups=16,
)


def small_model(motion: MotionConfig | None = None) -> ImageModel:
    """Every size away from SD 1.5's, so that nothing is right by default."""
    torch.manual_seed(0)
    return ImageModel(
        unet=UNet(SMALL.with_motion(motion)),
        vae=VAE(VAEConfig(block_out_channels=(16, 24), norm_num_groups=8, scaling_factor=0.5, layers_per_block=1)),
        text_encoder=TextEncoder(
            TextConfig(vocab_size=50, width=24, layers=1, num_heads=3, mlp_width=32, max_length=9)
        ),
        schedule=ScheduleConfig(
            prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        ),
        report=LoadReport(Path("x"), "built", None, "", 0),
    )


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some tensors in half precision, some not: types have to survive one by one."""
    return {key: t.half() if i % 2 else t for i, (key, t) in enumerate(tensors.items())}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return equal(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_saved_image_model_loads_by_itself(tmp_path, suffix):
    model = small_model()
    path = save_image_model(model, tmp_path / f"x{suffix}", metadata={"title": "shapes", "num_heads": "wrong"})
    loaded = load_base(path)
    assert loaded.unet.config == model.unet.config
    assert loaded.vae.config == model.vae.config
    assert loaded.text_encoder.config == model.text_encoder.config
    assert loaded.schedule == model.schedule
    assert same_weights(loaded.unet, model.unet) and same_weights(loaded.vae, model.vae)
    assert same_weights(loaded.text_encoder, model.text_encoder)
    assert read_state_dict(path).metadata["title"] == "shapes"


def test_a_saved_image_model_leaves_motion_out_and_may_be_half(tmp_path):
    model = small_model(MotionConfig(resolutions=(1, 2, 4), num_heads=2))
    loaded = load_base(save_image_model(model, tmp_path / "x.safetensors", dtype=torch.float16))
    assert loaded.unet.config.motion is None and loaded.report.applied == len(
        read_state_dict(tmp_path / "x.safetensors").tensors
    )
    assert {t.dtype for t in read_state_dict(tmp_path / "x.safetensors").tensors.values()} == {torch.float16}
    torch.testing.assert_close(loaded.unet.conv_in.weight, model.unet.conv_in.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "motion",
    [
        MotionConfig(version="v1", max_frames=24, resnet_norm_over_frames=True, resolutions=(1, 2, 4)),
        MotionConfig(version="v3", max_frames=16, num_heads=2, resolutions=(2, 4), norm_over_frames=True),
        MotionConfig(version="v2", mid_block=True, attentions_per_block=1, num_transformer_blocks=2, resolutions=(4,)),
        MotionConfig(version="v3", positional_encoding=False, resolutions=(1, 2, 4)),
        MotionConfig(version="v2", mid_block=True, temporal="convolution", resolutions=(2,)),
    ],
)
def test_a_saved_motion_module_loads_by_itself(tmp_path, motion):
    trained = small_model(motion).unet
    path = save_motion_module(trained, tmp_path / "mm.safetensors", metadata={"stage": "motion"})
    loaded, report = load_motion_module(small_model().unet, path)
    assert loaded.config == trained.config
    assert equal(dict(loaded.motion_parameters()), dict(trained.motion_parameters()))
    assert report.applied == sum(1 for _ in trained.motion_parameters())
    assert read_state_dict(path).metadata["stage"] == "motion"


@pytest.mark.parametrize("motion", [{"positional_encoding": False}, {"temporal": "convolution"}])
def test_variants_stay_in_the_official_format(tmp_path, motion):
    trained = small_model(MotionConfig(resolutions=(1, 2, 4), **motion)).unet
    parts = read_motion_parts(save_motion_module(trained, tmp_path / "a.safetensors"))
    copy = write_official_motion(parts, tmp_path / "b.safetensors")
    assert load_motion_module(small_model().unet, copy)[0].config == trained.config
    with pytest.raises(UserError, match="without positional encoding.*MotionAdapter has no other"):
        write_motion_adapter(parts, tmp_path / "adapter")


def test_an_image_unet_has_no_motion_module_to_save(tmp_path):
    with pytest.raises(UserError, match="got an image UNet"):
        save_motion_module(small_model().unet, tmp_path / "x.safetensors")


def test_a_motion_module_of_other_norm_groups_is_refused(tmp_path):
    path = save_motion_module(small_model(MotionConfig(resolutions=(1,))).unet, tmp_path / "x.safetensors")
    other = UNet(UNetConfig(**(vars(SMALL) | {"norm_num_groups": 8})))
    with pytest.raises(UserError, match="trained with 16 norm groups, for a base model of 8"):
        load_motion_module(other, path)


# --- round trips -----------------------------------------------------------------------------------------------------


def test_ldm_to_diffusers_and_back_is_exact(tmp_path):
    path = write(tmp_path / "a.safetensors", halved(ldm_tensors()), **SCHEDULE, title="x", **METADATA)
    write_diffusers(read_image_parts(path), tmp_path / "folder")
    write_ldm(read_image_parts(tmp_path / "folder"), tmp_path / "b.safetensors")
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert SCHEDULE | {"rescale_betas_zero_snr": True} == {name: scheduler[name] for name in SCHEDULE}
    there, back = read_state_dict(path), read_state_dict(tmp_path / "b.safetensors")
    assert equal(back.tensors, there.tensors)
    assert there.metadata.items() <= back.metadata.items()


def test_diffusers_to_ldm_and_back_is_exact(tmp_path, ldm_file):
    write_diffusers(read_image_parts(ldm_file), tmp_path / "a")
    write_ldm(read_image_parts(tmp_path / "a"), tmp_path / "x.ckpt")
    write_diffusers(read_image_parts(tmp_path / "x.ckpt"), tmp_path / "b")
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) == 12
    for name in names:
        if name.suffix == ".safetensors":
            assert equal(read_state_dict(tmp_path / "a" / name).tensors, read_state_dict(tmp_path / "b" / name).tensors)
        else:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(("version", "frames"), [("v1", 24), ("v2", 32), ("v3", None)])
def test_official_motion_to_diffusers_and_back_is_exact(tmp_path, version, frames):
    tensors = halved(motion_tensors(version))
    tensors = with_positional(tensors, frames) if frames else tensors
    path = write(tmp_path / "a.safetensors", tensors, note="kept")
    write_motion_adapter(read_motion_parts(path), tmp_path / "adapter", version=version)
    write_official_motion(read_motion_parts(tmp_path / "adapter"), tmp_path / "b.ckpt")
    back = read_state_dict(tmp_path / "b.ckpt")
    assert equal(back.tensors, tensors)
    assert back.metadata["version"] == version and back.metadata["note"] == "kept"


def test_diffusers_motion_to_official_and_back_is_exact(tmp_path):
    path = write(tmp_path / "x.safetensors", with_positional(motion_tensors("v2"), 32))
    a = write_motion_adapter(read_motion_parts(path), tmp_path / "a")
    write_official_motion(read_motion_parts(a), tmp_path / "y.safetensors")
    b = write_motion_adapter(read_motion_parts(tmp_path / "y.safetensors"), tmp_path / "b")
    weights = "diffusion_pytorch_model.safetensors"
    assert equal(read_state_dict(a / weights).tensors, read_state_dict(b / weights).tensors)
    assert (a / "config.json").read_text() == (b / "config.json").read_text()


# --- as others read it -----------------------------------------------------------------------------------------------


def test_the_folder_is_as_diffusers_reads_it(tmp_path, ldm_file):
    folder = write_diffusers(read_image_parts(ldm_file), tmp_path / "m")

    def config(name: str) -> dict:
        return json.loads((folder / name).read_text())

    unet, vae, text = (config(f"{part}/config.json") for part in ("unet", "vae", "text_encoder"))
    assert unet["attention_head_dim"] == 8 and unet["cross_attention_dim"] == 40
    assert unet["block_out_channels"] == [32, 64, 64, 96] and unet["layers_per_block"] == 2
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert vae["scaling_factor"] == 0.18215 and vae["block_out_channels"] == [32, 32, 64, 64]
    assert text["num_attention_heads"] == 4 and text["hidden_size"] == 40
    scheduler = config("scheduler/scheduler_config.json")
    assert (scheduler["beta_schedule"], scheduler["steps_offset"], scheduler["set_alpha_to_one"]) == (
        "scaled_linear",
        1,
        False,
    )
    parts = [name for name, value in config("model_index.json").items() if isinstance(value, list) and value[0]]
    assert sorted(parts) == sorted(p.name for p in folder.iterdir() if p.is_dir())


def test_transformers_opens_the_text_encoder_and_tokenizer(tmp_path, ldm_file):
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = write_diffusers(read_image_parts(ldm_file), tmp_path / "m")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    prompts = list(GOLDEN_TOKENS)[:5]
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert ids.tolist() == [GOLDEN_TOKENS[prompt] for prompt in prompts]
    assert Tokenizer.from_folder(folder / "tokenizer")(prompts)[:, 0].tolist() == ids.tolist()
    with torch.no_grad():
        expected = load_base(ldm_file).text_encoder(ids)
        torch.testing.assert_close(encoder(ids).last_hidden_state, expected)


def test_the_adapter_is_as_diffusers_reads_it(tmp_path):
    path = write(tmp_path / "x.safetensors", with_positional(motion_tensors("v1"), 24))
    folder = write_motion_adapter(read_motion_parts(path), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "MotionAdapter" and config["use_motion_mid_block"] is False
    assert config["motion_max_seq_length"] == 24 and config["motion_num_attention_heads"] == 8
    assert config["block_out_channels"] == [32, 64, 64, 96] and config["motion_layers_per_block"] == 2
    tensors = read_state_dict(folder / "diffusion_pytorch_model.safetensors").tensors
    assert len(tensors) == 520 + 20 and "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe" in tensors


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_needs_all_parts_and_clips_vocabulary(tmp_path):
    no_vae = {k: t for k, t in ldm_tensors().items() if not k.startswith("first_stage_model.")}
    with pytest.raises(UserError, match="without a VAE, expected all parts"):
        write_diffusers(read_image_parts(write(tmp_path / "a.safetensors", no_vae, **METADATA)), tmp_path / "m")
    path = save_image_model(small_model(), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="a text encoder of 50 tokens, expected CLIP's 49408"):
        write_diffusers(read_image_parts(path), tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"], "nothing half-written"


def test_other_folders_are_not_replaced(tmp_path, ldm_file):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="a folder with other content"):
        write_diffusers(read_image_parts(ldm_file), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").exists()
    with pytest.raises(UserError, match="it is a file"):
        write_diffusers(read_image_parts(ldm_file), ldm_file)


def test_layouts_that_diffusers_lacks_are_refused(tmp_path):
    unet = small_model(MotionConfig(version="v3", resolutions=(2, 4))).unet
    parts = read_motion_parts(save_motion_module(unet, tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=r"at resolutions \(2, 4\).*MotionAdapter has no other"):
        write_motion_adapter(parts, tmp_path / "a")
