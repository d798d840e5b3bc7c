"""Files to modules: the official numbers, every spelling, strictness, sharing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from animatediff.checkpoints.export import write_diffusers, write_motion_adapter
from animatediff.checkpoints.files import file_sha256, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.keymaps import LDM_TEXT, LDM_UNET, LDM_VAE
from animatediff.checkpoints.load import ImageModel, load_base, load_motion_module, load_personalised
from animatediff.checkpoints.parts import read_image_parts, read_motion_parts
from animatediff.config.networks import ScheduleConfig
from animatediff.utils import UserError
from tests.checkpoints.synthetic import (
    METADATA,
    equal,
    ldm_tensors,
    lora_tensors,
    motion_tensors,
    sparsectrl_tensors,
    with_positional,
    write,
)

GOLDEN = load_file(Path(__file__).parents[1] / "golden/nano/expected.safetensors")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def weights(model: ImageModel) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, "text": model.text_encoder}
    return {f"{name}/{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}


@torch.no_grad()
def predict(unet: torch.nn.Module) -> Tensor:
    """Noise predicted for the golden input, (b, c, f, h, w)."""
    x = GOLDEN["input.latents"].transpose(1, 2)
    return unet(x, torch.full((len(x),), 481), GOLDEN["text.last_hidden_state"]).transpose(1, 2)


@torch.no_grad()
def test_a_single_file_gives_the_official_numbers(base):
    torch.testing.assert_close(base.text_encoder(GOLDEN["input.token_ids"]), GOLDEN["text.last_hidden_state"], **CLOSE)
    torch.testing.assert_close(base.vae.encode(GOLDEN["input.image"])[0], GOLDEN["vae.mean"], **CLOSE)
    torch.testing.assert_close(predict(base.unet), GOLDEN["unet.image"], **CLOSE)


@pytest.mark.parametrize(
    ("version", "frames"),
    [("v1", 24), pytest.param("v2", 32, marks=pytest.mark.slow), pytest.param("v3", 32, marks=pytest.mark.slow)],
)
def test_motion_modules_give_the_official_numbers_and_share_the_image_weights(tmp_path, base, version, frames):
    path = write(tmp_path / "mm.ckpt", with_positional(motion_tensors(version), frames))
    unet, report = load_motion_module(base.unet, path)
    torch.testing.assert_close(predict(unet), GOLDEN[f"unet.{version}.t481"], **CLOSE)
    assert (report.version, report.applied) == (version, len(motion_tensors(version)))
    assert unet.config.motion.max_frames == frames
    weights = unet.state_dict()
    for name, weight in base.unet.state_dict().items():
        assert weights[name].data_ptr() == weight.data_ptr(), f"{name} is a copy"
    assert not unet.training


def test_the_report_says_what_was_loaded(ldm_file, base):
    assert base.report.applied == len(ldm_tensors()) and base.report.unused == []
    assert base.report.sha256 == file_sha256(ldm_file)
    line = str(base.report)
    assert str(ldm_file) in line and "966 tensors" in line and base.report.sha256[:10] in line and "\n" not in line


# --- the spellings of an SD 1.x single file --------------------------------------------------------------------------


def with_bookkeeping(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "model_ema.decay")
    ema = {f"model_ema.{key.replace('.', '')}": t for key, t in list(tensors.items())[:3]}
    unused_text = {
        f"{LDM_TEXT}text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.zeros(()),
        "cond_stage_model.text_projection": torch.zeros(4, 4),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "embedding_manager.embedder.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    return tensors | {key: torch.zeros(1) for key in extra} | ema | unused_text


def without_text_model_level(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(f"{LDM_TEXT}text_model.", LDM_TEXT): t for key, t in tensors.items()}


def with_linear_vae_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t[..., 0, 0] if "attn_1" in key and t.dim() == 4 else t for key, t in tensors.items()}


def with_diffusers_vae_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0.", ".norm.": ".group_norm."}

    def rename(key: str) -> str:
        head, mark, tail = key.partition(".attn_1")
        return head + mark + next((tail.replace(a, b) for a, b in names.items() if tail.startswith(a)), tail)

    return {rename(key): t for key, t in with_linear_vae_attention(tensors).items()}


SPELLINGS = {
    "bookkeeping": with_bookkeeping,
    "no text_model level": without_text_model_level,
    "linear VAE attention": with_linear_vae_attention,
    "diffusers' VAE attention": with_diffusers_vae_attention,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_model(tmp_path, base, name):
    tensors = SPELLINGS[name](ldm_tensors())
    assert tensors.keys() != ldm_tensors().keys() or name == "linear VAE attention"
    model = load_base(write(tmp_path / "x.safetensors", tensors, **METADATA))
    assert equal(weights(model), weights(base))
    if name == "bookkeeping":
        assert len(model.report.unused) == 13 and "EMA copies not used" in model.report.notes


def test_a_training_pickle_gives_the_same_model(tmp_path, base):
    content = {"epoch": 1, "state_dict": ldm_tensors(), "metadata": METADATA}
    torch.save(content, tmp_path / "x.ckpt")
    model = load_base(tmp_path / "x.ckpt")
    assert equal(weights(model), weights(base))
    assert any("unwrapped" in note for note in model.report.notes)


def test_half_precision_files_load_into_the_asked_dtype(tmp_path):
    path = write(tmp_path / "x.safetensors", {key: t.half() for key, t in ldm_tensors().items()}, **METADATA)
    assert {t.dtype for t in weights(load_base(path)).values()} == {torch.float32}
    assert {t.dtype for t in weights(load_base(path, dtype=torch.bfloat16)).values()} == {torch.bfloat16}


def test_heads_come_from_the_metadata(tmp_path):
    path = write(tmp_path / "x.safetensors", ldm_tensors(), num_heads="4", text_num_heads="2", prediction_type="sample")
    model = load_base(path)
    assert (model.unet.config.num_heads, model.text_encoder.config.num_heads) == (4, 2)
    assert model.schedule.prediction_type == "sample"


@pytest.mark.parametrize("name", ["num_heads", "text_num_heads", "vae_scaling_factor", "prediction_type"])
def test_impossible_metadata_is_named_with_its_file(tmp_path, name):
    path = write(tmp_path / "x.safetensors", ldm_tensors(), **METADATA | {name: "few"})
    with pytest.raises(UserError, match=f"{path}: got {name} 'few' in the metadata"):
        load_base(path)


def test_a_file_without_a_vae_or_text_encoder(tmp_path, base):
    no_vae = {key: t for key, t in ldm_tensors().items() if not key.startswith(LDM_VAE)}
    no_text = {key: t for key, t in ldm_tensors().items() if not key.startswith("cond_stage_model.")}
    model = load_base(write(tmp_path / "a.safetensors", no_vae, **METADATA))
    assert model.vae is None and "no VAE in it" in model.report.notes
    with pytest.raises(UserError, match="without a text encoder, expected a whole image model"):
        load_base(write(tmp_path / "b.safetensors", no_text, **METADATA))
    personal = load_personalised(tmp_path / "a.safetensors", base)
    assert personal.vae is base.vae and "no VAE in it: the base model's is used" in personal.report.notes
    personal = load_personalised(tmp_path / "b.safetensors", base)
    assert personal.text_encoder is base.text_encoder and "no text encoder" in str(personal.report)


# --- strictness ------------------------------------------------------------------------------------------------------


def changed(remove: str = "", add: tuple[str, ...] = (), reshape: str = "") -> dict[str, Tensor]:
    tensors = {key: t for key, t in ldm_tensors().items() if key != remove} | {key: torch.zeros(1) for key in add}
    return tensors | ({reshape: torch.zeros(3, 3)} if reshape else {})


MID_NORM = f"{LDM_UNET}middle_block.0.in_layers.0.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(remove=MID_NORM), "complete UNet.* 1 weights are missing, such as mid_block.resnets.0.norm1.weight"),
        (changed(reshape=MID_NORM), r"1 weights have another shape, such as mid_block.*\(3, 3\) for \(96,\)"),
        (changed(add=(f"{LDM_UNET}input_blocks.1.1.new.weight",)), "UNet.*1 weights have no place in it"),
        (changed(add=(f"{LDM_UNET}strange.weight",)), "1 entries that belong to no part of an image model .*strange"),
        (changed(add=("mystery",)), r"1 entries that belong to no part of an image model \(mystery\)"),
        (changed(remove=f"{LDM_VAE}decoder.conv_out.bias"), "VAE.*missing, such as decoder.conv_out.bias"),
        (changed(remove=f"{LDM_UNET}out.2.weight"), "got weights without conv_out.weight"),
        (changed(remove=f"{LDM_TEXT}text_model.final_layer_norm.bias"), "text encoder.*final_layer_norm.bias"),
    ],
)
def test_incomplete_and_overfull_image_models_are_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        load_base(write(tmp_path / "x.safetensors", tensors, **METADATA))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: lora_tensors("kohya_lora"), "this is a LoRA of an image model, not an image model: use it as"),
        (lambda: motion_tensors("v3"), "this is a motion module, not an image model: use it as `motion_module"),
        (lambda: {"conditioner.embedders.0.x": torch.zeros(1)}, "1 entries that belong to no part of an image model"),
        (lambda: {"cond_stage_model.model.x": torch.zeros(1)}, "this is an SD 2.x image model"),
        (lambda: {"control_model.x": torch.zeros(1)}, "this is a ControlNet, not"),
    ],
)
def test_other_files_are_no_image_models(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        load_base(write(tmp_path / "x.safetensors", tensors()))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: lora_tensors("motion_lora"), "this is a MotionLoRA, not a motion module: use it as"),
        (lambda: lora_tensors("domain_adapter"), "this is a domain adapter, not a motion module"),
        (lambda: sparsectrl_tensors("rgb"), "this is a SparseCtrl encoder, not a motion module"),
        (ldm_tensors, "this is an SD 1.x image model in one file, not a motion module"),
        (
            lambda: {
                f"down_blocks.{i}.motion_modules.0.temporal_transformer.norm.weight": torch.zeros(width)
                for i, width in enumerate((320, 640, 1280))
            },
            "a motion module of widths 320, 640, 1280, for a base model of widths 32, 64, 64, 96",
        ),
        (lambda: wide_module(), "widths 64, 64, 64, 96, for a base"),
        (lambda: drop_first(motion_tensors("v2")), "complete motion module.* 1 weights are missing"),
        (lambda: motion_tensors("v2") | {"up_blocks.0.motion_modules.3.x": torch.zeros(1)}, "have no place in it"),
    ],
)
def test_other_files_are_no_motion_modules(tmp_path, base, tensors, message):
    with pytest.raises(UserError, match=message):
        load_motion_module(base.unet, write(tmp_path / "x.safetensors", tensors()))


def wide_module() -> dict[str, Tensor]:
    return {
        key: torch.zeros([64 if n == 32 else n for n in t.shape]) if key.startswith("down_blocks.0.") else t
        for key, t in motion_tensors("v2").items()
    }


def drop_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[key] for key in list(tensors)[1:]}


def test_a_contradicting_version_is_refused(tmp_path, base):
    path = write(tmp_path / "x.safetensors", with_positional(motion_tensors("v2"), 32))
    with pytest.raises(UserError, match=r"got a v2 module \(has a mid block\) with a v1 config"):
        load_motion_module(base.unet, path, version="v1")


# --- motion modules --------------------------------------------------------------------------------------------------


def test_a_training_checkpoint_of_the_whole_unet_is_picked_apart(tmp_path, base):
    unet, _ = load_motion_module(base.unet, write(tmp_path / "mm.safetensors", motion_tensors("v3")), version="v3")
    whole = {f"module.{key}": t for key, t in unet.state_dict().items()}
    torch.save({"epoch": 1, "global_step": 9, "state_dict": whole}, tmp_path / "checkpoint.ckpt")
    again, report = load_motion_module(base.unet, tmp_path / "checkpoint.ckpt", version="v3")
    assert equal(again.state_dict(), unet.state_dict())
    assert len(report.unused) == 686 and any("686 other entries" in note for note in report.notes)


@pytest.mark.parametrize("prefix", ["unet.", "module.unet."])
def test_prefixed_motion_modules(tmp_path, base, prefix):
    path = write(tmp_path / "x.ckpt", {prefix + key: t for key, t in motion_tensors("v2").items()})
    _, report = load_motion_module(base.unet, path)
    assert report.applied == 546 and report.version == "animatelcm"


def test_a_video_unet_gets_another_motion_module(tmp_path, base):
    first, _ = load_motion_module(base.unet, write(tmp_path / "a.ckpt", motion_tensors("v2")))
    second, _ = load_motion_module(first, write(tmp_path / "b.ckpt", motion_tensors("v3")), version="v3")
    direct, _ = load_motion_module(base.unet, tmp_path / "b.ckpt", version="v3")
    assert equal(second.state_dict(), direct.state_dict())
    assert second.config == direct.config


def test_a_motion_module_takes_the_dtype_of_its_unet(tmp_path, ldm_file):
    base = load_base(ldm_file, dtype=torch.float16)
    unet, _ = load_motion_module(base.unet, write(tmp_path / "x.ckpt", motion_tensors("v2")))
    assert {t.dtype for t in unet.state_dict().values()} == {torch.float16}


def test_the_norm_switch_reaches_the_module(tmp_path, base):
    path = write(tmp_path / "x.ckpt", motion_tensors("v2"))
    unet, _ = load_motion_module(base.unet, path, norm_over_frames=True)
    assert unet.config.motion.norm_over_frames
    assert (predict(unet) - GOLDEN["unet.v2.t481"]).abs().max() > 1e-3


@pytest.mark.parametrize("place", ["folder", "file", "pipeline"])
def test_diffusers_motion_adapters(tmp_path, base, place):
    path = write(tmp_path / "x.safetensors", with_positional(motion_tensors("v2"), 32))
    folder = tmp_path / "motion_adapter"
    write_motion_adapter(read_motion_parts(path), folder)
    source = {"folder": folder, "file": folder / "diffusion_pytorch_model.safetensors", "pipeline": tmp_path}[place]
    path.unlink()
    unet, report = load_motion_module(base.unet, source)
    torch.testing.assert_close(predict(unet), GOLDEN["unet.v2.t481"], **CLOSE)
    assert report.kind == "motion-adapter" and report.applied == 546


def test_a_foreign_adapter_without_a_mid_block_must_be_told(tmp_path, base):
    """The length in its config is a setting of the conversion, and whether it has a mid block is not believed."""
    parts = read_motion_parts(write(tmp_path / "x.safetensors", motion_tensors("v3"), version="v3"))
    folder = write_motion_adapter(parts, tmp_path / "adapter")
    weights_file = folder / "diffusion_pytorch_model.safetensors"
    write_state_dict(weights_file, read_state_dict(weights_file).tensors)  # without our metadata
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"use_motion_mid_block": false', '"use_motion_mid_block": true'))
    with pytest.raises(UserError, match="version cannot be told"):
        load_motion_module(base.unet, folder)
    unet, _ = load_motion_module(base.unet, folder, version="v3")
    torch.testing.assert_close(predict(unet), GOLDEN["unet.v3.t481"], **CLOSE)


# --- personalised models and folders ---------------------------------------------------------------------------------


def test_personalised_models_leave_the_base_alone(tmp_path, base):
    before = {key: t.clone() for key, t in weights(base).items()}
    path = write(tmp_path / "x.safetensors", {key: t + 1 for key, t in ldm_tensors().items()})
    personal = load_personalised(path, base)
    assert equal(weights(base), before)
    torch.testing.assert_close(personal.unet.conv_in.weight, base.unet.conv_in.weight + 1)
    torch.testing.assert_close(personal.vae.quant_conv.bias, base.vae.quant_conv.bias + 1)
    assert personal.text_encoder.config == base.text_encoder.config, "heads are the base's where the file has none"


def test_a_schedule_that_the_file_does_not_tell_is_the_bases(tmp_path, base):
    path = write(tmp_path / "x.safetensors", ldm_tensors())
    schedule = ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert load_personalised(path, replace(base, schedule=schedule)).schedule == schedule
    write(path, ldm_tensors(), **{"timestep_spacing": "linspace", "modelspec.prediction_type": "sample"})
    own = replace(schedule, prediction_type="sample", timestep_spacing="linspace")
    assert load_personalised(path, replace(base, schedule=schedule)).schedule == own


def test_a_unet_alone_in_bare_names_is_a_personalised_model(tmp_path, base):
    """As ComfyUI has it."""
    unet = {key.removeprefix(LDM_UNET): t for key, t in ldm_tensors().items() if key.startswith(LDM_UNET)}
    personal = load_personalised(write(tmp_path / "x.safetensors", unet), base)
    assert equal(personal.unet.state_dict(), base.unet.state_dict()) and personal.vae is base.vae
    assert identify(tmp_path / "x.safetensors").kind == "sd1-checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ldm_file) -> Path:
    return write_diffusers(read_image_parts(ldm_file), tmp_path_factory.mktemp("diffusers") / "model")


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_a_diffusers_folder_gives_the_same_model(folder, base):
    model = load_base(folder)
    assert equal(weights(model), weights(base))
    assert model.unet.config == base.unet.config and model.text_encoder.config == base.text_encoder.config
    assert model.schedule.prediction_type == "epsilon"
    assert model.report.kind == "diffusers-folder" and model.report.sha256 == file_sha256(folder)


def test_folders_of_pickles_fp16_variants_and_shards(tmp_path, folder, base):
    model = copied(folder, tmp_path / "m")
    unet, vae, text = (model / name for name in ("unet", "vae", "text_encoder"))
    tensors = read_state_dict(unet / "diffusion_pytorch_model.safetensors").tensors
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    names = list(tensors)
    for i, part in enumerate((names[:300], names[300:])):
        torch.save({key: tensors[key].clone() for key in part}, unet / f"part-{i}.bin")
    weight_map = {key: f"part-{int(i >= 300)}.bin" for i, key in enumerate(names)}
    index = json.dumps({"weight_map": weight_map})
    (unet / "diffusion_pytorch_model.bin.index.json").write_text(index)
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    old = {key.removeprefix("text_model."): t for key, t in base.text_encoder.state_dict().items()}
    (text / "model.safetensors").unlink()
    torch.save(old | {"embeddings.position_ids": torch.arange(77)}, text / "pytorch_model.bin")
    loaded = load_base(model)
    assert equal(weights(loaded), weights(base))
    assert any("fp16" in note for note in loaded.report.notes)
    assert loaded.report.unused == ["text_encoder/embeddings.position_ids"]


def test_the_old_spelling_of_the_vae_attention_in_folders(tmp_path, folder, base):
    model = copied(folder, tmp_path / "m")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(key: str) -> str:
        head, mark, tail = key.partition("mid_block.attentions.0.")
        return head + mark + next((tail.replace(a, b) for a, b in names.items() if tail.startswith(a)), tail)

    tensors = read_state_dict(path).tensors
    assert sum(old(key) != key for key in tensors) == 16
    write_state_dict(path, {old(key): t for key, t in tensors.items()})
    assert equal(weights(load_base(model)), weights(base))


def test_incomplete_folders(tmp_path, folder, base):
    model = copied(folder, tmp_path / "m")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert load_base(model).vae is None
    assert load_personalised(model, base).vae is base.vae
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no unet/diffusion_pytorch_model.safetensors \(or \.bin\)"):
        load_base(model)


def test_a_folder_of_an_sd2_unet_is_refused_by_its_heads(tmp_path, folder):
    model = copied(folder, tmp_path / "m")
    config = (model / "unet" / "config.json").read_text()
    config = config.replace('"attention_head_dim": 8', '"attention_head_dim": [5, 10]')
    (model / "unet" / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"\[5, 10\] heads, expected one number"):
        load_base(model)
