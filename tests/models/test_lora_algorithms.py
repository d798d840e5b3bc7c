"""Every algorithm and dialect of LoRA from its file: the changes of weights, and what the networks then compute."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from animatediff.checkpoints.files import write_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.load import ImageModel, load_base
from animatediff.checkpoints.lora_files import parse_lora, read_lora
from animatediff.models.lora import LoRAStack
from tests.checkpoints.synthetic import METADATA, ldm_tensors, write
from tests.golden.synthetic_weights import synthetic_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = json.loads((GOLDEN / "lora/keys.json").read_text(encoding="utf-8"))
EXPECTED = load_file(GOLDEN / "lora/expected.safetensors")
NANO = load_file(GOLDEN / "nano/expected.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return load_base(write(tmp_path_factory.mktemp("base") / "nano.safetensors", ldm_tensors(), **METADATA))


def lora_tensors(name: str) -> dict[str, Tensor]:
    file = FILES[name]
    constants = {key: torch.tensor(value) for key, value in file["constants"].items()}
    return constants | {
        key: torch.as_tensor(synthetic_tensor(file["salt"], key, shape))
        for key, shape in file["keys"].items()
        if key not in constants
    }


def written(name: str, folder: Path) -> Path:
    if "adapter_config" in FILES[name]:
        (folder / "adapter_config.json").write_text(json.dumps(FILES[name]["adapter_config"]), encoding="utf-8")
    return write_state_dict(folder / f"{name}.safetensors", lora_tensors(name), metadata=FILES[name].get("metadata"))


def parameters(base: ImageModel) -> dict[str, Tensor]:
    networks = {"unet": base.unet, "text": base.text_encoder}
    return {
        f"{n}.{key}": p.detach().clone() for n, network in networks.items() for key, p in network.named_parameters()
    }


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def outputs(base: ImageModel) -> dict[str, Tensor]:
    latents = NANO["input.latents"].transpose(1, 2)
    sample = base.unet(latents, torch.tensor([481]), NANO["text.last_hidden_state"])
    text = base.text_encoder(NANO["input.token_ids"])
    return {"unet.sample": sample.transpose(1, 2), "text.last_hidden_state": text}


@pytest.mark.parametrize("name", FILES)
def test_golden(base, tmp_path, name):
    path = written(name, tmp_path)
    assert identify(path).kind == "lora"
    before = parameters(base)
    stack = LoRAStack(base.unet, base.text_encoder)
    report = stack.add(read_lora(path), 0.7)
    assert not report.unused and report.applied == report.total == len(FILES[name]["keys"])
    unmerged = outputs(base)
    stack.merge()
    after, merged = parameters(base), outputs(base)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.rpartition(".")[0] for key in changed} == set(FILES[name]["targets"])
    for key, expected in EXPECTED.items():
        if not key.startswith(f"{name}/"):
            continue
        key = key.removeprefix(f"{name}/")
        if key in merged:
            assert relative(merged[key], expected) < 1e-5 and relative(unmerged[key], expected) < 1e-5, key
        else:  # the change is what is left of a sum that was rounded to float32
            rounding = float(torch.finfo(torch.float32).eps * before[key].norm() / expected.norm())
            assert key in changed and relative(after[key] - before[key], expected) < 1e-5 + rounding, key
    stack.clear()
    assert all(torch.equal(p, before[key]) for key, p in parameters(base).items())


def test_scales_change_without_reading_anything_again(base):
    """Stacked with others, unmerged and merged: each change is made against the plain weight."""
    names = ("lokr", "dora", "oft", "glora")
    stack, single = LoRAStack(base.unet, base.text_encoder), {}
    before = parameters(base)
    for name in names:
        stack.add(parse_lora(lora_tensors(name), name=name), 0.4)
        stack.merge()
        single[name] = {key: p - before[key] for key, p in parameters(base).items()}
        stack.clear()
    for name in names:
        stack.add(parse_lora(lora_tensors(name), name=name), 1.3)
    for name in names:
        stack.set_scale(name, 0.4)
    stack.merge()
    for key, p in parameters(base).items():
        total = sum(changes[key] for changes in single.values())
        assert torch.allclose(p - before[key], total, rtol=0, atol=1e-6 * float(before[key].abs().max() + 1)), key
    for name in names:
        stack.set_scale(name, 0.0)
    assert all(torch.equal(p, before[key]) for key, p in parameters(base).items())
    stack.clear()


@pytest.mark.parametrize("name", ["loha", "lokr", "dora", "locon-mid"])
def test_factors_learn_unmerged(base, name):
    stack = LoRAStack(base.unet, base.text_encoder)
    stack.add(parse_lora(lora_tensors(name), name=name))
    stack.requires_grad_(True)
    latents = NANO["input.latents"].transpose(1, 2)[:1, :1]
    context = base.text_encoder(NANO["input.token_ids"][:1])
    base.unet(latents, torch.tensor([481]), context).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stack.parameters())
    stack.clear()
