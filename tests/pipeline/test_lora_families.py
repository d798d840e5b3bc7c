"""A LoRA belongs to a family of image models: applied where it fits, and named for what it is where it does not."""

import json
from pathlib import Path

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from scripts import convert
from scripts.animate import main
from tests import families, nano, sdxl
from tests.checkpoints.synthetic import write
from tests.nano import write_config

SMALL = {"prompt": "a vixen", "H": 64, "W": 96, "L": 2, "steps": 2, "seed": 3, "format": "png"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    sdxl.write_files(folder)
    (folder / "kohya.safetensors").rename(folder / "sdxl_lora.safetensors")
    nano.write_files(folder)
    lora = read_state_dict(folder / "kohya.safetensors").tensors
    write(folder / "sd1_lora.safetensors", lora, ss_base_model_version="sd_v1")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    write(
        folder / "sd2_lora.safetensors", {key.format("down"): torch.ones(4, 1024), key.format("up"): torch.ones(320, 4)}
    )
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    write(folder / "flux_lora.safetensors", {key.format("A"): torch.ones(4, 64), key.format("B"): torch.ones(64, 4)})
    key = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    write(folder / "wan_lora.safetensors", {key.format("A"): torch.ones(4, 64), key.format("B"): torch.ones(64, 4)})
    return folder


def run(files: Path, tmp_path: Path, base: str, lora: object, **values: object) -> int:
    entry = {"pretrained_model_path": str(files / f"{base}.safetensors"), "lora_model_path": lora} | SMALL | values
    config = write_config(tmp_path / "run.yaml", entry)
    return main(["--config", str(config), "--device", "cpu", "--output-dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"dreambooth_path": "nano"},
            "dreambooth_path: .*an SD 1.x image model .*the base .* is of SDXL: give it as the",
        ),
        ({"camera": {"path": "poses", "move": "zoom_in"}}, "camera.path: .*made for SD 1.x, but .*sdxl.* is of SDXL"),
        ({"embeddings": ["word"]}, "embeddings.0..path: .*made for SD 1.x, but .*sdxl.* is of SDXL"),
        ({"extra_motion_modules": {"path": "mm_v3"}}, "extra_motion_modules.0..path: .*for SD 1.x .* is of SDXL"),
    ],
)
def test_what_sdxl_does_not_take_is_named_before_anything_is_loaded(files, tmp_path, monkeypatch, option, message):
    write(files / "poses.safetensors", families.cameractrl_tensors())
    write(files / "word.safetensors", {"emb_params": torch.ones(1, 768)})
    monkeypatch.setattr("animatediff.pipeline.assemble.load_base", lambda path: pytest.fail("loaded"))
    config = json.dumps(option)
    for name in ("nano", "poses", "word", "mm_v3"):
        config = config.replace(f'"{name}"', json.dumps(str(files / f"{name}.safetensors")))
    motion = {} if "dreambooth_path" in option else {"motion_module": str(files / "sdxl-beta.safetensors")}
    with pytest.raises(UserError, match=message) as error:
        run(files, tmp_path, "sdxl", [], W=64, **motion, **json.loads(config))
    assert "\n" not in str(error.value)


def test_a_lora_of_another_size_is_named(files, tmp_path):
    with pytest.raises(UserError, match="kohya.safetensors: got down .*made for a network of another size"):
        run(files, tmp_path, "sdxl", str(files / "kohya.safetensors"))


@pytest.mark.parametrize(
    ("base", "lora", "message"),
    [
        ("nano", "sdxl_lora", "lora_model_path.*sdxl_lora.*this is a LoRA for SDXL, but .*nano.* is of SD 1.x"),
        ("sdxl", "sd1_lora", "lora_model_path.*sd1_lora.*this is a LoRA .*made for SD 1.x, but .*sdxl.* is of SDXL"),
        ("nano", "sd2_lora", "this is a LoRA for SD 2.x, not a LoRA of an image model: .* here it is SD 1.x or SDXL"),
        ("nano", "flux_lora", "this is a LoRA for a diffusion transformer .Flux"),
        ("nano", "wan_lora", "this is a LoRA for a video transformer .Wan"),
    ],
)
def test_named_for_what_it_is_before_anything_is_loaded(files, tmp_path, monkeypatch, base, lora, message):
    monkeypatch.setattr("animatediff.pipeline.assemble.load_base", lambda path: pytest.fail("loaded"))
    with pytest.raises(Exception, match=message):
        run(files, tmp_path, base, str(files / f"{lora}.safetensors"))


@pytest.mark.slow
def test_sdxl_loras_stack_through_the_command_line(files, tmp_path):
    """Each with a scale of its own, and with the words that one of them brings."""
    generator = torch.Generator().manual_seed(0)
    words = {
        "bundle_emb.vixen.clip_l": torch.randn(2, 24, generator=generator),
        "bundle_emb.vixen.clip_g": torch.randn(2, 40, generator=generator),
    }
    path = files / "sdxl_lora.safetensors"
    bundle = write(tmp_path / "bundle.safetensors", read_state_dict(path).tensors | words)
    assert identify(bundle).kind == "sdxl-lora"
    stack = [{"path": str(path), "scale": 0.5}, {"path": str(bundle), "scale": 0.25}]
    run(files, tmp_path, "sdxl", stack)
    (clip,) = (tmp_path / "out/sample").iterdir()
    assert len(list(clip.glob("*.png"))) == 2
    pipe = AnimateDiffPipeline.from_config(tmp_path / "run.yaml", device="cpu")
    loras = pipe.model.loras
    assert [loras.scale(name) for name in loras.names] == [0.5, 0.25]
    assert "2 vectors, in prompts as vixen" in pipe.model.reports
    for tokenizer in (pipe.model.tokenizer, pipe.model.tokenizer_2):
        assert int(tokenizer(["a vixen"]).max()) > 49407
    plain = AnimateDiffPipeline.from_config(tmp_path / "run.yaml", device="cpu", lora_model_path="")
    plain.load_lora(bundle, 0.25)
    assert "2 vectors, in prompts as vixen" in plain.model.reports


@pytest.mark.parametrize("base", ["nano", "sdxl"])
def test_words_of_the_other_family_are_refused(files, tmp_path, base):
    word = {"bundle_emb.vixen.clip_g": torch.ones(1, 40), "bundle_emb.vixen.clip_l": torch.ones(1, 24)}
    if base == "sdxl":
        word = {"bundle_emb.vixen.string_to_param.*": torch.ones(1, 24)}
    lora = {"nano": "kohya", "sdxl": "sdxl_lora"}[base]
    path = write(tmp_path / "b.safetensors", read_state_dict(files / f"{lora}.safetensors").tensors | word)
    made = {"nano": "for SDXL with an SD 1.x base", "sdxl": "for SD 1.x with an SDXL base"}[base]
    with pytest.raises(Exception, match=f"LoRA b: got a textual inversion {made}"):
        run(files, tmp_path, base, str(path))


def test_an_sdxl_lora_to_diffusers_and_back(files, tmp_path, monkeypatch):
    """kohya numbers SDXL's two text encoders: `lora_te_` would be SD 1.x's."""
    path, there, back = files / "sdxl_lora.safetensors", tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    for source, target, to in ((path, there, "diffusers-lora"), (there, back, "kohya")):
        monkeypatch.setattr("sys.argv", ["convert.py", str(source), str(target), "--to", to])
        convert.main()
        assert identify(target).kind == "sdxl-lora"
    stems = [{key.split(".")[0].split("_")[1] for key in read_state_dict(p).tensors} for p in (path, back)]
    assert stems[0] == stems[1] == {"unet", "te1", "te2"}
