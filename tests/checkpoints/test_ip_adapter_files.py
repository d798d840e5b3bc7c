"""IP-Adapter and image encoder files: every spelling gives one network, a wrong file is named."""

import json
from dataclasses import replace

import pytest
import torch

from animatediff.checkpoints.files import write_state_dict
from animatediff.checkpoints.image_encoder_files import load_image_encoder
from animatediff.checkpoints.ip_adapter_files import load_ip_adapter
from animatediff.models.unet import UNet
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, ldm_tensors, motion_tensors, write
from tests.checkpoints.test_sparsectrl_files import SMALL
from tests.control import TABLES, clip_vision_tensors, ip_adapter_tensors, write_image_encoder

Tensors = dict[str, torch.Tensor]


def training_script(tensors: Tensors) -> Tensors:
    pairs = (("image_proj.", "image_proj_model."), ("ip_adapter.", "adapter_modules."))
    return {key.replace(*next(p for p in pairs if key.startswith(p[0]))): t for key, t in tensors.items()}


def accelerate(tensors: Tensors) -> Tensors:
    layers = {f"ip_adapter.{n}.": e["module"] for n, e in TABLES["ip_layers"].items()}
    renamed = {}
    for key, tensor in training_script(tensors).items():
        for start, module in layers.items():
            processor = f"unet.{module}.transformer_blocks.0.attn2.processor."
            key = key.replace(start.replace("ip_adapter", "adapter_modules"), processor)
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("spelling", ["safetensors", "bin", "training", "accelerate", "half"])
@pytest.mark.parametrize("variant", ["base", "plus", "full"])
def test_every_spelling_gives_the_same_adapter(tmp_path, base, variant, spelling):
    plain = ip_adapter_tensors(variant)
    path = tmp_path / "x.safetensors"
    if spelling == "bin":
        path, names = tmp_path / "x.bin", ("image_proj", "ip_adapter")
        torch.save({g: {k[len(g) + 1 :]: t for k, t in plain.items() if k.startswith(g)} for g in names}, path)
    elif spelling == "half":  # files of both types occur
        write(path, {k: t.half() if k.startswith("ip_adapter.1.") else t for k, t in plain.items()})
    else:
        write(path, {"training": training_script, "accelerate": accelerate}.get(spelling, dict)(plain))
    adapter, report = load_ip_adapter(path, base.unet)
    if spelling == "half":
        plain = {k: t.half().float() if k.startswith("ip_adapter.1.") else t for k, t in plain.items()}
    assert equal(dict(adapter.state_dict()), plain)
    assert (report.version, report.applied, adapter.training) == (variant, len(plain), False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: motion_tensors("v3"),
            "this is a motion module, not an IP-Adapter for SD 1.x or SDXL: use it as `motion_module",
        ),
        (ldm_tensors, "this is an SD 1.x image model in one file, not an IP-Adapter"),
        (
            lambda: _recognise("ip-adapter faceid"),
            "a FaceID adapter, not an IP-Adapter.*: it needs InsightFace's face recognition",
        ),
        (
            lambda: _recognise("ip-adapter faceid plus"),
            "a FaceID adapter, not an IP-Adapter.*: it needs InsightFace's face recognition",
        ),
        (
            lambda: _recognise("ip-adapter faceid portrait"),
            "a FaceID adapter, not an IP-Adapter.*: it needs InsightFace's face recognition",
        ),
        (
            lambda: _recognise("sdxl ip-adapter"),
            "got an IP-Adapter of context_dim 2048, expected the base's 40: choose an IP-Adapter made",
        ),
        (lambda: _cut("ip_adapter.31."), "for cross-attentions of widths .*choose an IP-Adapter made for this base"),
        (lambda: _cut("image_proj.norm.bias"), "1 weights are missing, such as image_proj.norm.bias"),
        (lambda: _cut("ip_adapter."), "an IP-Adapter without keys for any layer"),
    ],
)
def test_wrong_files_are_named(tmp_path, base, build, message):
    with pytest.raises(UserError, match=message) as error:
        load_ip_adapter(write(tmp_path / "x.safetensors", build()), base.unet)
    assert "\n" not in str(error.value)


def _recognise(name: str) -> Tensors:
    return {key: torch.zeros(shape) for key, shape in TABLES["recognise"][name].items()}


def _cut(start: str) -> Tensors:
    return {key: t for key, t in ip_adapter_tensors("base").items() if not key.startswith(start)}


def test_an_adapter_of_another_base_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", ip_adapter_tensors("base"))
    with pytest.raises(UserError, match="for cross-attentions of widths .*expected the base's"):
        load_ip_adapter(path, UNet(replace(SMALL, context_dim=40)))


def open_clip(tensors: Tensors) -> Tensors:
    names = [
        ("vision_model.embeddings.class_embedding", "class_embedding"),
        ("vision_model.embeddings.patch_embedding", "conv1"),
        ("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("vision_model.pre_layrnorm", "ln_pre"),
        ("vision_model.post_layernorm", "ln_post"),
        ("vision_model.encoder.layers", "transformer.resblocks"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            tensor = torch.cat([tensors[key.replace(".q_proj.", f".{n}_proj.")] for n in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        for theirs, ours in names:
            key = key.replace(theirs, ours)
        if key == "visual_projection.weight":
            key, tensor = "proj", tensor.T.contiguous()
        renamed[f"visual.{key}"] = tensor
    return renamed | {"logit_scale": torch.zeros(()), "token_embedding.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("spelling", ["folder", "file", "open_clip", "whole CLIP"])
def test_every_spelling_gives_the_same_image_encoder(tmp_path, spelling):
    folder = write_image_encoder(tmp_path)
    path = folder if spelling == "folder" else folder / "model.safetensors"
    if spelling == "open_clip":
        write(path, open_clip(clip_vision_tensors()))
    elif spelling == "whole CLIP":
        extra = {"text_model.final_layer_norm.bias": torch.zeros(2), "logit_scale": torch.zeros(())}
        write(path, clip_vision_tensors() | extra | {"vision_model.embeddings.position_ids": torch.arange(17)[None]})
    encoder = load_image_encoder(path)
    assert equal(dict(encoder.model.state_dict()), clip_vision_tensors())
    assert (encoder.size, encoder.width, encoder.embedding_width) == (64, 48, 24)
    assert encoder.hidden(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 48)


def test_wrong_image_encoders_are_named(tmp_path):
    with pytest.raises(UserError, match="the folder .*expected an image encoder: it has no model.safetensors"):
        load_image_encoder(tmp_path)
    path = write_state_dict(tmp_path / "x.safetensors", clip_vision_tensors())
    with pytest.raises(UserError, match="width 48, whose heads no tensor tells: put its config.json beside it"):
        load_image_encoder(path)
    with pytest.raises(UserError, match="expected a CLIP vision model with projection .*has no visual_projection"):
        load_image_encoder(write_state_dict(path, motion_tensors("v3")))


@pytest.mark.parametrize(
    ("cut", "config", "message"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1.weight", {}, "without a whole vision_model.encoder.layers.0.mlp.fc1"),
        ("vision_model.embeddings.patch_embedding.weight", {}, "without a whole .*patch_embedding.weight"),
        ("vision_model.post_layernorm.bias", {}, "1 weights are missing, such as vision_model.post_layernorm.bias"),
        ("", {"num_attention_heads": "many"}, "got 'many' heads .*expected a divisor.*correct its config.json"),
        ("", {"hidden_act": "sine"}, "hidden_act 'sine'.*expected a divisor and one of quick_gelu, gelu"),
    ],
)
def test_damaged_image_encoders_are_told_in_one_line(tmp_path, cut, config, message):
    folder = write_image_encoder(tmp_path)
    write(folder / "model.safetensors", {key: t for key, t in clip_vision_tensors().items() if key != cut})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config))
    with pytest.raises(UserError, match=message) as error:
        load_image_encoder(folder)
    assert "\n" not in str(error.value)
