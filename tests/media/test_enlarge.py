"""Clips made larger, by Lanczos and by spandrel's models, and given their colours back."""

import importlib
import sys
import types

import pytest
import torch
from torch.nn.functional import interpolate as resize

from animatediff.media.enlarge import enlarge, load_upscaler, match_colors
from animatediff.utils import UserError
from tests.media.interpolation import psnr, texture_clip

CLIP = texture_clip("pan", 0, frames=2, size=32)


def test_lanczos():
    assert torch.equal(enlarge(CLIP, 32, 32), CLIP)
    larger = enlarge(CLIP, 64, 48)
    assert larger.shape == (2, 3, 64, 48)
    assert psnr(enlarge(enlarge(CLIP, 64, 64), 32, 32), CLIP) > 40
    assert enlarge(torch.full_like(CLIP, 77), 40, 40).unique().tolist() == [77]


def test_a_model_is_brought_to_the_size():
    double = lambda video: resize(video.float(), scale_factor=2).to(torch.uint8)  # noqa: E731
    assert torch.equal(enlarge(CLIP, 64, 64, upscale=double), double(CLIP))
    assert enlarge(CLIP, 48, 48, upscale=double).shape == (2, 3, 48, 48)


def test_colors_are_the_first_pass_s():
    """Mean and spread of every channel come back, by one map for the whole clip."""
    dim = (CLIP.float() * torch.tensor([0.5, 0.8, 1.0]).reshape(3, 1, 1) + 20).to(torch.uint8)
    matched = match_colors(enlarge(dim, 64, 64), CLIP)
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(matched.float(), (0, 2, 3)), statistic(CLIP.float(), (0, 2, 3)), atol=1.5)
    assert torch.equal(match_colors(CLIP, CLIP), CLIP)
    flat = torch.full_like(CLIP, 9)
    assert torch.equal(match_colors(flat, torch.full_like(CLIP, 70)), torch.full_like(CLIP, 70))


def test_without_spandrel(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(UserError, match=r'an upscaler model needs spandrel.*: pip install "animatediff\[finish\]"'):
        load_upscaler(tmp_path / "x.pth")


def test_a_model_by_spandrel_s_interface(monkeypatch, tmp_path):
    """RGB in [0, 1] in batches of one frame; models of other channels are refused. No spandrel is needed for it."""

    class Descriptor:
        scale, input_channels, output_channels = 2, 3, 3
        architecture = types.SimpleNamespace(name="Fake")

        def eval(self):
            return self

        def __call__(self, frame):
            assert frame.shape == (1, 3, 32, 32)
            assert 0 <= frame.min() <= frame.max() <= 1
            return resize(frame, scale_factor=2) * 1.01

    class Loader:
        def __init__(self, device):
            pass

        def load_from_file(self, path):
            return Descriptor()

    fake = types.ModuleType("spandrel")
    fake.ImageModelDescriptor, fake.ModelLoader = Descriptor, Loader
    monkeypatch.setitem(sys.modules, "spandrel", fake)
    upscale, factor = load_upscaler(tmp_path / "x.pth")
    assert factor == 2
    made = upscale(CLIP)
    assert made.dtype == torch.uint8
    assert torch.equal(made, (resize(CLIP.float() / 255, scale_factor=2) * 1.01 * 255).round().clamp(0, 255).byte())
    monkeypatch.setattr(Descriptor, "input_channels", 4)
    with pytest.raises(UserError, match="a Fake model, expected one from RGB pictures"):
        load_upscaler(tmp_path / "x.pth")


@pytest.fixture
def spandrel(monkeypatch):
    """The real one. Of torchvision, which no model here needs, its imports take three names."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    try:
        importlib.import_module(names[0])
    except (ImportError, RuntimeError):
        functional = types.ModuleType(names[2])
        functional.InterpolationMode = functional.rotate = functional.normalize = object  # type: ignore[attr-defined]
        for name in names:
            monkeypatch.setitem(sys.modules, name, functional if name == names[2] else types.ModuleType(name))
    return pytest.importorskip("spandrel")


@pytest.mark.slow
def test_an_esrgan_of_random_weights(spandrel, tmp_path):
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    network = ESRGAN(num_filters=8, num_blocks=1, scale=2)
    torch.save(network.state_dict(), tmp_path / "2x.pth")
    upscale, factor = load_upscaler(tmp_path / "2x.pth")
    assert factor == 2
    with torch.no_grad():
        true = network.eval()(CLIP.float() / 255).mul(255).round().clamp(0, 255).to(torch.uint8)
    assert (upscale(CLIP).int() - true.int()).abs().max() <= 1
    (tmp_path / "none.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="none.pth, expected an upscaler that spandrel knows"):
        load_upscaler(tmp_path / "none.pth")
