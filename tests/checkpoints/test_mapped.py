"""Weights that are read in another type: the same numbers, and what was mapped does not stay in memory."""

import re

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict, write_state_dict
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.checkpoints.mapped import MAPS, MappedFiles, converted
from animatediff.pipeline.fit import resident_bytes

linux = pytest.mark.skipif(not MAPS.exists(), reason="Linux tells where files are mapped")
MIB = 2**20


@pytest.fixture
def file(tmp_path):
    """64 MiB in four tensors."""
    tensors = {f"layer{i}.weight": torch.randn(4 * MIB) for i in range(4)}
    return write_state_dict(tmp_path / "large.safetensors", tensors), tensors


@linux
def test_pages_of_a_file_are_given_back(file):
    path, expected = file
    tensors = read_state_dict(path).tensors
    before = resident_bytes()
    made = converted(tensors, "cpu", torch.float16)
    assert resident_bytes() - before < 48 * MIB, "32 MiB are made, of 64 that were read few are left"
    for key, tensor in expected.items():
        assert torch.equal(made[key], tensor.half())
        assert torch.equal(tensors[key], tensor), "and come back from the file"


@linux
def test_nothing_but_pages_of_files_is_given_back(file):
    path, expected = file
    own, small = torch.arange(MIB), torch.arange(10)
    files = MappedFiles()
    assert not files.give_back(own) and not files.give_back(small) and not files.give_back(own[::2])
    assert torch.equal(own, torch.arange(MIB))
    tensors = read_state_dict(path).tensors
    files = MappedFiles()
    middle = tensors["layer1.weight"]
    assert files.give_back(middle) and not files.give_back(middle[:100])
    assert all(torch.equal(tensors[key], expected[key]) for key in expected), "neighbours of a page stay"


def test_without_linux_tensors_are_converted_all_the_same(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    tensors = {"a": torch.ones(10_000), "b": torch.ones(3, dtype=torch.float16)}
    made = converted(tensors, "cpu", torch.float16)
    assert made["a"].dtype == torch.float16 and made["b"] is tensors["b"] and MappedFiles().ranges == []


def test_a_type_that_is_read_at_once_is_that_of_float32_rounded(nano):
    half, plain = (load_base(nano / "nano.safetensors", dtype=dtype) for dtype in (torch.float16, torch.float32))
    motion = nano / "mm_v3.safetensors"
    half_unet, unet = (load_motion_module(image.unet, motion)[0] for image in (half, plain))
    for one, other in ((half_unet, unet), (half.vae, plain.vae), (half.text_encoder, plain.text_encoder)):
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert a.dtype == torch.float16 and torch.equal(a, b.half()), name


@linux
def test_what_a_file_holds_in_the_type_stays_mapped(nano):
    unet = load_base(nano / "nano.safetensors").unet
    addresses = [int(line[1], 16) for line in re.finditer(r"^(\w+)-\w+ .*nano.safetensors$", MAPS.read_text(), re.M)]
    assert addresses and any(p.data_ptr() > min(addresses) for p in unet.parameters())
    files = MappedFiles()
    weight = unet.mid_block.resnets[0].conv1.weight
    assert any(first <= weight.data_ptr() < last for first, last in files.ranges)
