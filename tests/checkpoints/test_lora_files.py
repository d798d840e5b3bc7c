"""LoRA files of every dialect: the official tables apply to the last key, and all spellings mean the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from animatediff.checkpoints.files import write_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.lora_files import in_dialect, parse_lora, read_lora, write_lora
from animatediff.checkpoints.lora_keys import path_of
from animatediff.config.networks import MOTION_VERSIONS, TextConfig, UNetConfig
from animatediff.models.lora import LoRA, LoRAStack
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.utils import UserError
from tests.golden.synthetic_weights import synthetic_tensor

TABLES = json.loads((Path(__file__).parents[1] / "golden/nano/keys.json").read_text(encoding="utf-8"))
NANO = UNetConfig(block_out_channels=(32, 64, 64, 96), context_dim=40)
SALTS = {"motion_lora": "nano-motion-lora", "domain_adapter": "nano-adapter", "kohya_lora": "nano-kohya"}
LDM = "model.diffusion_model."


def synthetic_lora(table: str) -> dict[str, Tensor]:
    return {
        key: torch.tensor(4.0)
        if key.endswith(".alpha")
        else torch.from_numpy(synthetic_tensor(SALTS[table], key, shape))
        for key, shape in TABLES[table].items()
    }


def nano_unet(version: str | None = None) -> UNet:
    """Random weights, of which no layer is the identity."""
    torch.manual_seed(0)
    unet = UNet(NANO.with_motion(MOTION_VERSIONS[version] if version else None)).requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if name.endswith("temporal_transformer.proj_out.weight"):
            parameter.normal_(std=0.1)
    return unet


def predict(unet: UNet) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 2, 4, 8, 8, generator=rng), torch.randn(1, 5, 40, generator=rng)
    return unet(x, torch.tensor([481]), context)


def entries_of(tensors: dict[str, Tensor], **kwargs) -> dict[str, tuple]:
    lora = parse_lora(tensors, name="x", **kwargs)
    assert not lora.unread
    return described(lora)


def described(lora: LoRA) -> dict[str, tuple]:
    return {e.target: (e.algorithm, e.alpha, *e.tensors.items()) for e in lora.entries}


def assert_same_entries(got: dict[str, tuple], expected: dict[str, tuple]) -> None:
    assert got.keys() == expected.keys()
    for target, values in expected.items():
        assert got[target][:2] == values[:2]
        for (name, a), (expected_name, b) in zip(sorted(got[target][2:]), sorted(values[2:]), strict=True):
            assert name == expected_name and torch.equal(a, b), target


def renamed(tensors: dict[str, Tensor], *changes: tuple[str, str]) -> dict[str, Tensor]:
    for old, new in changes:
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("table", "version", "kind", "network"),
    [
        ("motion_lora", "v2", "motion-lora", "motion_modules."),
        ("domain_adapter", "v3", "domain-adapter", "attentions."),
        ("kohya_lora", None, "lora", "attentions."),
    ],
)
def test_official_files_apply_to_the_last_key(tmp_path, table, version, kind, network):
    path = write_state_dict(tmp_path / "style.v1.safetensors", synthetic_lora(table))
    unet, text = nano_unet(version), TextEncoder(TextConfig(width=40, layers=2, num_heads=4, mlp_width=80))
    lora = read_lora(path)
    assert (lora.name, lora.kind) == ("style.v1", kind)
    stack, plain = LoRAStack(unet, text.requires_grad_(False)), predict(unet)
    report = stack.add(lora, 0.6)
    assert report.applied == report.total == len(TABLES[table]) and not report.unused
    unmerged = predict(unet)
    assert not torch.allclose(unmerged, plain, atol=1e-2)
    before = {name: p for name, p in [*unet.named_parameters(), *text.named_parameters()]}
    stack.merge()
    torch.testing.assert_close(predict(unet), unmerged, rtol=1e-4, atol=1e-5)
    merged = {name: p for name, p in [*unet.named_parameters(), *text.named_parameters()]}
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert len(changed) == len(lora.entries)
    assert all(network in name or "text_model.encoder" in name for name in changed)


def test_motion_lora_of_v2_on_v3_names_the_mid_block():
    tensors = synthetic_lora("motion_lora")
    report = LoRAStack(nano_unet("v3")).add(parse_lora(tensors, name="ZoomIn"), 1.0)
    assert set(report.unused) == {key for key in tensors if key.startswith("mid_block.")}
    assert len(report.unused) == 16 and report.applied == 320
    with pytest.raises(UserError, match="no motion modules"):
        LoRAStack(nano_unet()).add(parse_lora(tensors, name="ZoomIn"), 1.0)


def test_motion_lora_spellings():
    official = synthetic_lora("motion_lora")
    expected = entries_of(official)
    adapter = renamed(
        {f"unet.{key}": tensor for key, tensor in official.items()},
        (".temporal_transformer", ""),
        ("attention_blocks.0", "attn1"),
        ("attention_blocks.1", "attn2"),
    )
    assert "unet.mid_block.motion_modules.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight" in adapter
    assert_same_entries(entries_of(adapter), expected)
    peft = renamed(
        adapter,
        (".processor", ""),
        ("to_out_lora", "to_out.0_lora"),
        ("_lora.down", ".lora_A"),
        ("_lora.up", ".lora_B"),
    )
    assert "unet.mid_block.motion_modules.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in peft
    assert_same_entries(
        entries_of(renamed(peft, (".lora_A", ".lora_A.default"), (".lora_B", ".lora_B.default"))), expected
    )
    assert_same_entries(entries_of(peft), expected)
    assert parse_lora(peft, name="x").kind == "motion-lora"


def test_one_lora_in_four_dialects_gives_one_output():
    old = {f"unet.{key}": tensor for key, tensor in synthetic_lora("domain_adapter").items()}
    new = renamed(old, (".processor", ""), ("to_out_lora", "to_out.0_lora"), ("_lora.", ".lora."))
    peft = renamed(new, (".lora.down", ".lora_A"), (".lora.up", ".lora_B"))
    kohya = {}
    for key, tensor in peft.items():
        stem, kind, end = key.removeprefix("unet.").rsplit(".", 2)
        kohya[f"lora_unet_{stem.replace('.', '_')}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[kind] }.{end}"] = (
            tensor
        )
    outputs = []
    for tensors in (old, new, peft, kohya):
        unet = nano_unet()
        report = LoRAStack(unet).add(parse_lora(tensors, name="x"), 0.8)
        assert report.applied == len(tensors) == 256
        outputs.append(predict(unet))
    assert not torch.allclose(outputs[0], predict(nano_unet()), atol=1e-2)
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


@pytest.mark.parametrize("sep", [".", "_"])
def test_ldm_names_reach_every_layer_of_the_unet(sep):
    """A LoCon in LDM names for each matrix and kernel of the checkpoint."""
    tensors, prefix = {}, "lora_unet_" if sep == "_" else "unet."
    for key, shape in TABLES["ldm_checkpoint"].items():
        if key.startswith(LDM) and len(shape) > 1:
            stem = prefix + key.removeprefix(LDM).removesuffix(".weight").replace(".", sep)
            tensors[f"{stem}.lora_down.weight"] = torch.ones(1, *shape[1:])
            tensors[f"{stem}.lora_up.weight"] = torch.full((shape[0], 1, *[1] * len(shape[2:])), 1e-3)
    unet = nano_unet()
    layers = {name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    lora = parse_lora(tensors, name="locon")
    report = LoRAStack(unet).add(lora, 1.0)
    assert report.applied == len(tensors) == 2 * len(layers)
    assert {entry.target for entry in lora.entries} == {f"unet.{name.replace('.', '_')}" for name in layers}


def test_ldm_names_put_layers_where_they_belong():
    names = {
        "input_blocks_1_1_proj_in": "down_blocks_0_attentions_0_proj_in",
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_5_0_in_layers_2": "down_blocks_1_resnets_1_conv1",
        "middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
        "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
        "output_blocks_11_0_skip_connection": "up_blocks_3_resnets_2_conv_shortcut",
        "output_blocks_4_1_proj_out": "up_blocks_1_attentions_1_proj_out",
        "time_embed_2": "time_embedding_linear_2",
        "out_2": "conv_out",
    }
    for ldm, ours in names.items():
        pair = {f"lora_unet_{ldm}.lora_{part}.weight": torch.ones(1, 1) for part in ("down", "up")}
        assert list(entries_of(pair)) == [f"unet.{ours}"]


TEXT_STEMS = {
    "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_": ("down", "up"),
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_": ("down", "up"),
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.": ("down", "up"),
    "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.": ("down", "up"),
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_": ("A", "B"),
    "text_encoder.encoder.layers.3.self_attn.q_proj.lora_": ("A", "B"),
    "base_model.model.text_model.encoder.layers.3.self_attn.q_proj.lora_": ("A", "B"),
}


@pytest.mark.parametrize("stem", TEXT_STEMS)
def test_text_encoder_spellings(stem):
    pair = {f"{stem}{part}.weight": torch.ones(1, 1) for part in TEXT_STEMS[stem]}
    assert list(entries_of(pair)) == ["text.text_model_encoder_layers_3_self_attn_q_proj"]


STEM = "lora_unet_down_blocks_0_attentions_0_proj_in"
PAIR = {f"{STEM}.lora_down.weight": torch.ones(4, 32, 1, 1), f"{STEM}.lora_up.weight": torch.ones(32, 4, 1, 1)}
PEFT_STEM = "unet.down_blocks.0.attentions.0.proj_in"
PEFT_PAIR = {
    f"{PEFT_STEM}.lora_A.weight": torch.ones(4, 32, 1, 1),
    f"{PEFT_STEM}.lora_B.weight": torch.ones(32, 4, 1, 1),
}


def only_factor(lora: LoRA) -> float:
    (entry,) = lora.entries
    return entry.factor()


def test_alpha_and_mid_of_a_kohya_file():
    tensors = PAIR | {
        f"{STEM}.alpha": torch.tensor(8.0, dtype=torch.float16),
        f"{STEM}.lora_mid.weight": torch.ones(4, 4, 3, 3),
    }
    lora = parse_lora(tensors, name="x")
    assert only_factor(lora) == 2.0 and lora.entries[0].factor("official") == 1.0
    assert lora.entries[0].tensors["mid"].shape == (4, 4, 3, 3)
    assert only_factor(parse_lora(PAIR, name="x")) == 1.0


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 1}, 2.0),
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 2, "alpha_pattern": {"attentions.0.proj_in": 12, "conv_in": 1}}, 3.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
    ],
)
def test_alpha_of_a_peft_file(tmp_path, config, factor):
    embedded = write_state_dict(
        tmp_path / "a.safetensors", PEFT_PAIR, metadata={"lora_adapter_metadata": json.dumps(config)}
    )
    assert only_factor(read_lora(embedded)) == factor
    plain = write_state_dict(tmp_path / "b.safetensors", PEFT_PAIR)
    kohya = write_state_dict(tmp_path / "c.safetensors", PAIR)
    assert only_factor(read_lora(plain)) == 1.0
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert only_factor(read_lora(plain)) == factor
    assert only_factor(read_lora(kohya)) == 1.0  # the config beside it is another file's


@pytest.mark.parametrize(
    ("stem", "ends"),
    [
        (PEFT_STEM, (".lora.down", ".lora.up")),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q", ("_lora.down", "_lora.up")),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", (".lora_linear_layer.down", ".lora_linear_layer.up")),
    ],
)
def test_alpha_in_the_metadata_holds_for_all_of_diffusers_names(stem, ends):
    config = {"unet.lora_alpha": 1, "text_encoder.lora_alpha": 1}
    told = {"metadata": {"lora_adapter_metadata": json.dumps(config)}}
    pair = {f"{stem}{end}.weight": torch.ones(4, 4) for end in ends}
    assert only_factor(parse_lora(pair, name="x", **told)) == 0.25
    assert only_factor(parse_lora(pair | {f"{stem}.alpha": torch.tensor(2.0)}, name="x", **told)) == 0.5
    assert only_factor(parse_lora(pair, name="x", peft_config={"lora_alpha": 1})) == 1.0  # another file's


def test_wrapped_pickle_and_unread_keys(tmp_path):
    motion = {f"module.{key}": tensor for key, tensor in synthetic_lora("motion_lora").items()}
    torch.save({"state_dict": motion, "epoch": 1, "animatediff_config": {"x": 1}}, tmp_path / "pan.ckpt")
    lora = read_lora(tmp_path / "pan.ckpt", name="PanLeft")
    assert lora.name == "PanLeft" and not lora.unread
    assert_same_entries(described(lora), entries_of(synthetic_lora("motion_lora")))
    extra = parse_lora(PAIR | {"bundle_emb.face.string_to_param.*": torch.ones(2, 2)}, name="x")
    assert not extra.unread and list(extra.embeddings) == ["face"]
    extra = parse_lora(PAIR | {"something.else": torch.ones(2, 2)}, name="x")
    assert extra.unread == ("something.else",)
    assert "something.else" in str(LoRAStack(nano_unet()).add(extra))


UNSUPPORTED = {
    "IP-Adapter": {"image_proj.proj.weight": 1, "ip_adapter.1.to_k_ip.weight": 1},
    "diffusion transformer": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": 1},
    "diffusion transformer ": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": 1},
    "video transformer": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": 1},
    "another video model": {"unet.down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": 1},
    "AdaLoRA": {"base_model.model.down_blocks.0.attentions.0.proj_in.lora_E": 1},
    "VeRA": {"base_model.model.down_blocks.0.attentions.0.proj_in.vera_lambda_b": 1},
    "T-LoRA": {f"{STEM}.lambda_layer": 1},
    "OFT adapter of a LyCORIS preview": {f"{STEM}.oft_diag": 1},
}


@pytest.mark.parametrize("what", UNSUPPORTED)
@pytest.mark.parametrize("beside", [{}, PAIR], ids=["alone", "beside a LoRA"])
def test_other_adapters_are_named_for_what_they_are(tmp_path, what, beside):
    tensors = beside | {key: torch.ones(1, width) for key, width in UNSUPPORTED[what].items()}
    path = write_state_dict(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=f"x.safetensors: this is .*{what.strip()}"):
        read_lora(path)


SDXL = {
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": 1,
    "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.lora_down.weight": 1,
    "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight": 1,
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": 2048,
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": 2048,
}


@pytest.mark.parametrize("key", SDXL)
def test_a_lora_for_sdxl_is_known_and_does_not_go_onto_sd_1(tmp_path, key):
    up = key.replace("down.weight", "up.weight").replace("lora_A", "lora_B")
    pair = {key: torch.ones(1, SDXL[key]), up: torch.ones(1, 1)}
    path = write_state_dict(tmp_path / "xl.safetensors", PAIR | pair)
    assert identify(path).kind == "sdxl-lora" and identify(path).base == "SDXL"
    lora = read_lora(path)
    assert lora.base == "SDXL" and len(lora.entries) == 2
    unet = UNet(UNetConfig(block_out_channels=(32, 64, 64, 96), context_dim=768))
    with pytest.raises(UserError, match="made for SDXL, expected one for SD 1.x"):
        LoRAStack(unet).add(lora)


@pytest.mark.parametrize(("base", "what"), [("sdxl_base_v1-0", "SDXL"), ("sd_v2", "SD 2.x"), ("sd_v1", "SD 1.x")])
def test_kohya_metadata_names_the_base(base, what):
    assert parse_lora(PAIR, name="x", metadata={"ss_base_model_version": base}).base == what


def test_prefixes_with_dots_and_without_a_network():
    """ComfyUI's saved LoRAs, and those that join prefix and path with a dot."""
    expected = entries_of(PAIR)
    dotted = STEM.replace("lora_unet_", "").replace("down_blocks_0_attentions_0_", "down_blocks.0.attentions.0.")
    for stem in (f"lora_unet.{dotted}", "diffusion_model.input_blocks.1.1.proj_in", f"lycoris_{STEM[10:]}", dotted):
        assert_same_entries(entries_of(renamed(PAIR, (STEM, stem))), expected)


def test_image_and_motion_layers_in_one_file(tmp_path):
    """Each part goes where it belongs."""
    motion = synthetic_lora("motion_lora")
    path = write_state_dict(tmp_path / "both.safetensors", motion | PAIR)
    assert identify(path).kind == "lora"
    lora, unet = read_lora(path), nano_unet("v2")
    report = LoRAStack(unet).add(lora)
    assert report.applied == len(motion) + 2 and not report.unused
    assert LoRAStack(nano_unet()).add(lora).applied == 2


@pytest.mark.parametrize("spelling", ["kohya", "peft", "dotted"])
def test_temporal_loras_of_other_trainers_are_motion_loras(tmp_path, spelling):
    """MotionDirector's, for one, where they were trained on the layers that AnimateDiff has."""
    tensors = {}
    for key, tensor in synthetic_lora("motion_lora").items():
        stem, _, end = key.replace("processor.", "").rpartition("_lora.")
        part, layer = end.split(".")[0], stem + ".0" * stem.endswith("to_out")
        tensors |= {
            "kohya": {f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight": tensor},
            "peft": {f"base_model.model.{layer}.lora_{'A' if part == 'down' else 'B'}.motion.weight": tensor},
            "dotted": {f"unet.{layer}.lora.{part}.weight": tensor},
        }[spelling]
    path = write_state_dict(tmp_path / "director.safetensors", tensors)
    assert identify(path).kind == "motion-lora"
    assert_same_entries(described(read_lora(path)), entries_of(synthetic_lora("motion_lora")))


def director_layers(unet: UNet, choice: str) -> list[tuple[str, nn.Linear]]:
    """What MotionDirector changes of the official UNet, in the order in which torch walks it: the middle is last."""
    inside = {
        "attentions": ".attention_blocks.",
        "blocks": "temporal_transformer.transformer_blocks.",
        "whole": ".temporal_transformer.",
    }
    order = ("proj_in", "transformer_blocks", "proj_out")
    found = [
        (name, module)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and inside[choice] in name
    ]
    part = lambda name: next(i for i, word in enumerate(order) if f"temporal_transformer.{word}" in name)  # noqa: E731
    block = lambda name: ("down_blocks", "up_blocks", "mid_block").index(name.split(".")[0])  # noqa: E731
    return sorted(found, key=lambda f: (block(f[0]), f[0].split(".temporal_transformer.")[0], part(f[0])))


@pytest.mark.parametrize(
    ("version", "choice"),
    [
        ("v2", "whole"),
        ("v3", "attentions"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("v2", "attentions"), ("v2", "blocks"), ("v3", "blocks"), ("v3", "whole"))
        ),
    ],
)
def test_lists_of_motion_director_are_motion_loras(tmp_path, version, choice):
    """No names, only order and shapes: what the list means is what the named file means."""
    unet = nano_unet(version)
    layers = director_layers(unet, choice)
    factors = [
        (torch.randn(layer.out_features, 2 + i % 2), torch.randn(2 + i % 2, layer.in_features))
        for i, (_, layer) in enumerate(layers)
    ]
    path = tmp_path / "500_temporal_unet.pt"
    torch.save([nn.Parameter(t) for pair in factors for t in pair], path)
    assert identify(path).kind == "motion-lora" and "MotionDirector" in identify(path).notes[0]
    before = {name: layer.weight.clone() for name, layer in layers}
    loras = LoRAStack(unet)
    assert loras.add(read_lora(path), 0.5).applied == 2 * len(layers)
    loras.merge()
    for (name, layer), (up, down) in zip(layers, factors, strict=True):
        assert torch.allclose(layer.weight - before[name], 0.5 * up @ down, atol=1e-4), name


def test_lists_of_other_layers_are_refused_by_name(tmp_path):
    path = tmp_path / "temporal_unet.pt"
    for content in ([torch.ones(8, 2), torch.ones(2, 8)], [torch.ones(8, 2)] * 3, [torch.ones(4, 2, 3), torch.ones(2)]):
        torch.save(content, path)
        with pytest.raises(UserError, match="a list .as MotionDirector .* not our layers'.*expected named tensors"):
            identify(path)


def test_motion_director_of_animatediff_in_safetensors(tmp_path):
    """Its names of layers within layers: `to_out.processor.0_lora`."""
    tensors, unet = {}, nano_unet("v3")
    for name, layer in director_layers(unet, "blocks"):
        parent, _, last = name.rpartition(".")
        tensors[f"{parent}.processor.{last}_lora.up.weight"] = torch.randn(layer.out_features, 2)
        tensors[f"{parent}.processor.{last}_lora.down.weight"] = torch.randn(2, layer.in_features)
    path = write_state_dict(tmp_path / "temporal.safetensors", tensors, metadata={"model_type": "motion_director"})
    assert identify(path).kind == "motion-lora"
    report = LoRAStack(unet).add(read_lora(path))
    assert report.applied == len(tensors) and not report.unused


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "adapter_model.bin", "diffusion_pytorch_model.safetensors"]
)
def test_folders_of_diffusers_and_peft(tmp_path, name):
    folder = tmp_path / "style.v2"
    folder.mkdir()
    if name.endswith(".bin"):
        torch.save(PAIR, folder / name)
    else:
        write_state_dict(folder / name, PAIR)
    assert identify(folder).kind == "lora"
    lora = read_lora(folder)
    assert lora.name == "style.v2" and len(lora.entries) == 1
    with pytest.raises(UserError, match="expected a LoRA: it has no pytorch_lora_weights"):
        read_lora(tmp_path)


@pytest.mark.parametrize("table", ["motion_lora", "domain_adapter", "kohya_lora"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_other_dialects_hold_the_same_changes(tmp_path, table, dialect):
    lora = parse_lora(synthetic_lora(table), name="x")
    again = read_lora(write_lora(in_dialect(lora, dialect), tmp_path / "x.safetensors"))
    assert {e.target: e.factor() for e in again.entries} == {e.target: 1.0 for e in lora.entries}
    assert not again.unread
    by_target = [sorted(one.entries, key=lambda entry: entry.target) for one in (again, lora)]
    for a, b in zip(*by_target, strict=True):
        assert a.target == b.target and all(torch.equal(a.tensors[name], b.tensors[name]) for name in ("down", "up"))


def test_dialects_of_convolutions_and_alphas(tmp_path):
    tensors = {
        f"{STEM}.lora_down.weight": torch.randn(4, 32, 1, 1),
        f"{STEM}.lora_up.weight": torch.randn(32, 4, 1, 1),
        f"{STEM}.alpha": torch.tensor(2.0),
        "lora_unet_conv_in.lora_down.weight": torch.randn(3, 4, 1, 1),
        "lora_unet_conv_in.lora_mid.weight": torch.randn(3, 3, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.randn(32, 3, 1, 1),
    }
    lora, weights = parse_lora(tensors, name="x"), []
    for dialect in (None, "kohya", "diffusers"):
        file = write_lora(in_dialect(lora, dialect), tmp_path / f"{dialect}.safetensors") if dialect else None
        unet = nano_unet()
        stack = LoRAStack(unet)
        assert not stack.add(read_lora(file) if file else lora, 0.5).unused
        stack.merge()
        weights.append((unet.conv_in.weight, unet.down_blocks[0].attentions[0].proj_in.weight))
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    for a, b in zip(weights[0], weights[2], strict=True):  # the Tucker form is multiplied out there
        torch.testing.assert_close(a, b)
    loha = {f"{STEM}.hada_{name}": torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    with pytest.raises(UserError, match="down_blocks.0.attentions.0.proj_in is no plain LoRA .loha."):
        in_dialect(parse_lora(loha, name="x"), "kohya")


def test_every_path_of_the_networks_is_found_again():
    networks = {"unet": nano_unet("v2"), "text": TextEncoder(TextConfig(width=40, layers=2, num_heads=4, mlp_width=80))}
    for network, root in networks.items():
        for path, module in root.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                assert path_of(f"{network}.{path.replace('.', '_')}") == path


def test_broken_files():
    down, up = PAIR
    with pytest.raises(UserError, match="without its up weight"):
        parse_lora({down: PAIR[down], f"{STEM}.alpha": torch.tensor(1.0)}, name="x")
    with pytest.raises(UserError, match=r"shape \(4,\) of .*lora_up.weight"):
        parse_lora(PAIR | {up: torch.ones(4)}, name="x")
    with pytest.raises(UserError, match="lora_adapter_metadata"):
        parse_lora(PEFT_PAIR, name="x", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="for one layer"):
        parse_lora(PAIR | PEFT_PAIR, name="x")
    with pytest.raises(UserError, match="got both .*lora_down.* and .*hada_w1_a for one layer"):
        parse_lora(PAIR | {f"{STEM}.hada_w1_a": torch.ones(1, 1)}, name="x")
    with pytest.raises(UserError, match="of .*alpha, expected one number"):
        parse_lora(PAIR | {f"{STEM}.alpha": torch.ones(2)}, name="x")
    for pattern in ("(a+)+", "[", "(a" * 300):  # the first would take for ever
        with pytest.raises(UserError, match="the pattern"):
            parse_lora(PEFT_PAIR, name="x", peft_config={"lora_alpha": 1, "alpha_pattern": {pattern: 2}})
    for config in ({"lora_alpha": [1]}, {"lora_alpha": 1, "alpha_pattern": 3}, {"lora_alpha": True}):
        with pytest.raises(UserError, match="configuration, expected|expected a mapping|in the LoRA"):
            parse_lora(PEFT_PAIR, name="x", peft_config=config)
    with pytest.raises(UserError, match="no LoRA weights.*other.blocks.0"):
        parse_lora({"other.blocks.0.lora_A.weight": torch.ones(1, 1)}, name="x")


def test_files_that_are_no_adapters_are_named(tmp_path):
    motion = {key: torch.ones(shape) for key, shape in TABLES["motion_module"]["v3"].items()}
    path = write_state_dict(tmp_path / "mm.safetensors", motion)
    with pytest.raises(UserError, match="mm.safetensors: this is a motion module, not a LoRA.*motion_module: "):
        read_lora(path)


def test_cameractrls_image_lora(tmp_path):
    """Its wrapper, beside what its training counted."""
    path = tmp_path / "RealEstate10K_LoRA.ckpt"
    torch.save({"epoch": 1, "global_step": 2, "lora_state_dict": synthetic_lora("domain_adapter")}, path)
    assert identify(path).kind == "domain-adapter"
    assert_same_entries(described(read_lora(path)), entries_of(synthetic_lora("domain_adapter")))
