"""SparseCtrl against the official numbers; a freshly built one changes nothing."""

import copy
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl
from animatediff.config.networks import MOTION_VERSIONS, SparseCtrlConfig, UNetConfig
from animatediff.models.controlnet_network import PIXEL_WIDTHS
from animatediff.models.sparsectrl_encoder import SparseCtrl, build_sparsectrl
from tests.checkpoints.synthetic import sparsectrl_tensors, write
from tests.models.test_golden import assert_close, golden
from tests.nano import write_files

GOLDEN = load_file(Path(__file__).parents[1] / "golden/nano/expected.safetensors")
T = torch.tensor([481])
KINDS = ("rgb", "scribble")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    base = load_base(folder / "nano.safetensors")
    return base, load_motion_module(base.unet, folder / "mm_v3.safetensors")[0]


def condition(kind: str, frames: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The golden images as the first and the last frame of a clip, and the mask."""
    images = golden(f"input.sparsectrl_{kind}")[0]
    clip, given = torch.zeros(frames, *images.shape[1:]), torch.zeros(frames)
    clip[[0, -1]], given[[0, -1]] = images, 1.0
    return clip, given


def frames_first(name: str) -> torch.Tensor:
    return rearrange(golden(name), "b f c h w -> (b f) c h w")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_official_numbers(base, tmp_path, kind):
    image, video = base
    encoder, report = load_sparsectrl(
        write(tmp_path / "x.safetensors", sparsectrl_tensors(kind)), image.unet, image.vae
    )
    assert encoder.config.kind == kind and report.applied == len(sparsectrl_tensors(kind))
    text = GOLDEN["text.last_hidden_state"][:1]
    down, mid = encoder(encoder.embed(*condition(kind))[None], T, text)
    down, mid = [0.8 * residual for residual in down], 0.8 * mid
    assert_close(down[0], frames_first(f"sparsectrl.{kind}.down0"))
    # After a CNN of sums over 2304 numbers and 8 ResNets rounding moves these by up to 5e-4, and golden numbers are
    # rounded, too: exactly computed, ours are always as far from them.
    precise = copy.deepcopy(encoder).double()
    embedded = precise.embed(*(x.double() for x in condition(kind)))[None]
    deep, middle = precise(embedded, T, text.double())
    assert_close(0.8 * deep[-1], frames_first(f"sparsectrl.{kind}.down_last"), 2e-5)
    assert_close(0.8 * middle, frames_first(f"sparsectrl.{kind}.mid"), 2e-5)
    alike = encoder(encoder.embed(*condition(kind))[None], T, text[:, None].expand(-1, 5, -1, -1))
    assert_close(0.8 * alike[1], mid)  # one text for each frame
    residuals = {"down_residuals": [0.8 * residual for residual in deep], "mid_residual": 0.8 * middle}
    steered = copy.deepcopy(video).double()(golden("input.latents")[:1].double(), T, text.double(), **residuals)
    assert_close(steered, golden(f"sparsectrl.{kind}.unet_v3"), 2e-5)  # what it is given is as far from the golden


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_one_changes_nothing(base, kind):
    """All residuals are zero; with heads that pass everything on, it is the image model's encoder fed with zeros."""
    image, video = base
    encoder = build_sparsectrl(video, kind)
    text = GOLDEN["text.last_hidden_state"][:1]
    embedded = encoder.embed(*condition(kind))[None]
    down, mid = encoder(embedded, T, text)
    assert not embedded.any() and not mid.any() and not any(residual.any() for residual in down)

    for head in (*encoder.controlnet_down_blocks, encoder.controlnet_mid_block):
        torch.nn.init.dirac_(head.weight)
    seen = []
    hooks = [image.unet.mid_block.register_forward_hook(lambda *call: seen.append(call[2]))]
    try:
        image.unet(torch.zeros(1, 5, 4, 8, 16), T, text)
    finally:
        hooks[0].remove()
    assert_close(encoder(embedded, T, text)[1], seen[0])


@pytest.mark.parametrize(("kind", "parameters", "keys"), [("rgb", 496_730_880, 478), ("scribble", 497_802_784, 492)])
def test_sizes_of_the_released_files(kind, parameters, keys):
    config = (
        SparseCtrlConfig() if kind == "rgb" else SparseCtrlConfig(condition_channels=3, pixel_channels=PIXEL_WIDTHS)
    )
    with torch.device("meta"):
        encoder = SparseCtrl(config)
    assert (sum(p.numel() for p in encoder.parameters()), len(encoder.state_dict())) == (parameters, keys)
    assert encoder.config.unet == UNetConfig(motion=MOTION_VERSIONS["sparsectrl"])
