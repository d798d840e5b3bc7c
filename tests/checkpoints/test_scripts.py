"""scripts/doctor.py and scripts/convert.py as a person runs them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from animatediff.checkpoints.files import read_json, read_state_dict, write_state_dict
from scripts import convert as convert_script
from tests.checkpoints.synthetic import equal, ldm_tensors, lora_tensors, motion_tensors, with_positional, write
from tests.control import controlnet_diffusers_tensors, controlnet_tensors

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(name: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def failed_cleanly(result: subprocess.CompletedProcess[str], *words: str) -> bool:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    return all(word in result.stderr for word in words)


@pytest.mark.slow
def test_inspect_describes_several_files_and_goes_on_after_a_bad_one(tmp_path):
    tensors = with_positional(motion_tensors("v3"), 32)
    name = next(iter(tensors))
    tensors = tensors | {name: torch.tensor([float("nan"), float("inf"), -float("inf")] + [0.0] * 29)}
    motion = write(tmp_path / "mm.safetensors", tensors, title="test")
    lora = write(tmp_path / "lora.ckpt", lora_tensors("motion_lora"))
    lightning = write(tmp_path / "AnimateDiff_Lightning_8step.ckpt", with_positional(motion_tensors("v2"), 32))
    (tmp_path / "page.ckpt").write_text("<html>")
    result = run("doctor.py", motion, tmp_path / "page.ckpt", lora, lightning, cwd=tmp_path)
    assert failed_cleanly(result, "an HTML page")
    first, second = result.stdout.split(str(lora) + "\n")
    for text in (
        "motion-module: a motion module",
        "v3",
        "SD 1.x layout of widths 32, 64, 64, 96",
        "float32",
        f"{sum(t.numel() for t in tensors.values()):,} in 560 tensors",
        hashlib.sha256(motion.read_bytes()).hexdigest(),
        "1 / 2",
        "positional encoding: 32 frames",
        "title = test",
        f"motion_module: {motion}",
    ):
        assert text in first, text
    assert "sampling" not in first
    assert "AnimateDiff-Lightning of 8 steps: sampler euler, trailing timestep_spacing, 8 steps, guidance" in second
    assert "motion-lora: a MotionLoRA" in second
    assert f"motion_module_lora_configs: [{{path: {lora}, alpha: 1.0}}]" in second


@pytest.mark.slow
def test_convert_there_and_back(tmp_path, ldm_file, convert):
    result = run("convert.py", ldm_file, "folder", "--to", "diffusers", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("wrote folder, a diffusers folder, from ")
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "--to", "ldm")
    assert equal(read_state_dict(tmp_path / "back.safetensors").tensors, ldm_tensors())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["doctor.py", "convert.py"])
def test_a_mistyped_option_is_told_in_one_line(tmp_path, name):
    assert failed_cleanly(run(name, "a", "b", "--too", cwd=tmp_path), "--help")


def test_convert_refuses_the_wrong_kind_in_one_line(tmp_path, mistake):
    motion = write(tmp_path / "mm.safetensors", motion_tensors("v2"))
    told = mistake(convert_script.main, motion, tmp_path / "out.safetensors", "--to", "ldm")
    assert "this is a motion module, not an image model" in told
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def convert():
    """scripts/convert.py in this process."""
    return lambda *args: convert_script.main([str(argument) for argument in args])


def test_convert_stamps_the_version_of_a_motion_module(tmp_path, convert):
    source = write(tmp_path / "a.ckpt", motion_tensors("v3"))
    with pytest.raises(ValueError, match="version cannot be told"):
        convert(source, tmp_path / "b.safetensors", "--to", "official-motion")
    convert(source, tmp_path / "b.safetensors", "--to", "official-motion", "--version", "v1")
    written = read_state_dict(tmp_path / "b.safetensors")
    assert equal(written.tensors, motion_tensors("v3")) and written.metadata["version"] == "v1"


def test_convert_writes_and_replaces_adapters(tmp_path, convert, capsys):
    source = write(tmp_path / "a.safetensors", with_positional(motion_tensors("v2"), 32))
    convert(source, tmp_path / "adapter", "--to", "diffusers-motion")
    with pytest.raises(ValueError, match="which exists: choose another name, or add --overwrite"):
        convert(source, tmp_path / "adapter", "--to", "diffusers-motion")
    convert(source, tmp_path / "adapter", "--to", "diffusers-motion", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert "a MotionAdapter folder" in capsys.readouterr().out


def test_convert_takes_a_controlnet_there_and_back(tmp_path, convert):
    whole = write(tmp_path / "a.safetensors", controlnet_tensors() | ldm_tensors())  # v1.0, with the image model in it
    convert(whole, tmp_path / "folder", "--to", "diffusers-controlnet")
    folder = read_state_dict(tmp_path / "folder/diffusion_pytorch_model.safetensors")
    assert equal(folder.tensors, controlnet_diffusers_tensors())
    assert read_json(tmp_path / "folder/config.json")["cross_attention_dim"] == 40
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "--to", "controlnet")
    assert equal(read_state_dict(tmp_path / "back.safetensors").tensors, controlnet_tensors())


def test_convert_names_what_it_left_out(tmp_path, convert, capsys):
    tensors = motion_tensors("v2") | {"conv_in.weight": torch.zeros(32, 4, 3, 3)}
    source = write_state_dict(tmp_path / "a.ckpt", {f"module.{key}": t for key, t in tensors.items()})
    convert(source, tmp_path / "b.safetensors", "--to", "official-motion")
    assert "left out 1 entries: conv_in.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a.safetensors", "a.safetensors", "--to", "ldm"), "as IN and .* as OUT, expected two places"),
        (("a.safetensors", ".", "--to", "diffusers", "--overwrite"), "expected two places"),
        (("a.safetensors", "b", "--to", "ldm"), r"expected a file name ending in \.safetensors"),
        (("a.safetensors", "b.safetensors", "--to", "diffusers"), "expected the name of a folder"),
        (("none.safetensors", "b.safetensors", "--to", "ldm"), "there is no such file"),
        (("a.safetensors", "no/b.safetensors", "--to", "official-motion"), "expected an existing folder"),
        (("a.safetensors", "b.safetensors", "--to", "ldm", "--version", "v1"), "expected it for motion modules only"),
    ],
)
def test_convert_refuses(tmp_path, monkeypatch, convert, args, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors", motion_tensors("v2"))
    with pytest.raises(ValueError, match=message):
        convert(*args)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


@pytest.mark.slow
def test_convert_a_lora(tmp_path):
    plain = write(tmp_path / "style.safetensors", lora_tensors("kohya_lora"))
    result = run("convert.py", plain, "peft.safetensors", "--to", "diffusers-lora", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"wrote peft.safetensors, a LoRA in diffusers' (PEFT) keys, from {plain}" in result.stdout
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert key in read_state_dict(tmp_path / "peft.safetensors").tensors
    assert failed_cleanly(
        run("convert.py", plain, "x.safetensors", "--to", "kohya", "--version", "v1", cwd=tmp_path), "--version"
    )
