"""Learned models of frames between frames: RIFE's weights of every known version, and TorchScript programs."""

import pytest
import torch
from torch import Tensor, nn

from animatediff.checkpoints.interpolator_files import load_interpolator, rife_version
from animatediff.media.interpolate import interpolate
from animatediff.models.ifnet import VERSIONS, IFNet
from animatediff.utils import UserError
from tests.golden.synthetic_weights import synthetic_tensor
from tests.media.interpolation import blend, texture_clip

GOLDEN = {  # what the networks of vs-rife make at 0.3 of `ENDS`, every 23rd pixel from (9, 5) on, times 1000
    "4.6": (474, 544, 450, 525, 613, 509, 580, 415, 436, 644, 485, 564, 623, 498, 516, 636, 567, 592, 790, 517, 728,
            622, 538, 548, 406, 512, 398),
    "4.7 to 4.9": (391, 578, 515, 523, 516, 539, 545, 342, 490, 691, 501, 571, 616, 529, 504, 616, 552, 551, 836, 524,
                   712, 627, 403, 535, 422, 495, 395),
    "4.25 and 4.26": (400, 548, 474, 572, 526, 506, 529, 371, 460, 692, 485, 570, 617, 553, 509, 593, 535, 565, 767,
                      508, 684, 611, 471, 556, 365, 521, 400),
}  # fmt: skip
ENDS = texture_clip("pan", 0, frames=3, size=64)[::2].float()[:, None] / 255
FIRST_AND_LAST_INPUTS = {  # channels that the first convolutions of the first and the last block see, and come out
    "4.5": (7, 12, 20), "4.6": (7, 12, 24), "4.7 to 4.9": (15, 20, 24), "4.10 to 4.13": (23, 28, 24),
    "4.12 and 4.13 lite": (15, 20, 24), "4.14 to 4.19, 4.24": (23, 28, 24), "4.15 to 4.17 lite": (15, 20, 24),
    "4.20": (23, 28, 24), "4.21 to 4.23": (23, 36, 52), "4.22 lite": (15, 28, 52), "4.25 and 4.26": (15, 28, 52),
    "4.25 lite": (15, 28, 52),
}  # fmt: skip


def weights(version: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in IFNet(VERSIONS[version]).state_dict().items()}
    made = {key: torch.from_numpy(synthetic_tensor("rife", key, shape)) for key, shape in shapes.items()}
    return {key: t * 0.7 if "convblock" in key and key.endswith("weight") else t for key, t in made.items()}


def saved(folder, version: str, **changed: Tensor):
    """As training saves them: with a prefix, and what is needed in training alone."""
    tensors = weights(version) | changed | {"teacher.conv0.0.0.weight": torch.zeros(1), "caltime.0.bias": torch.ones(1)}
    torch.save({f"module.{key}": t for key, t in tensors.items()}, folder / "flownet.pkl")
    return folder / "flownet.pkl"


@pytest.mark.parametrize("version", VERSIONS)
def test_layout_of_every_version(version):
    """Names and sizes as the released networks have them; no two are alike, and nothing may be missing."""
    with torch.device("meta"):
        tensors = IFNet(VERSIONS[version]).state_dict()
    last = len(VERSIONS[version].widths) - 1
    sizes = (tensors["block0.conv0.0.0.weight"].shape[1], tensors[f"block{last}.conv0.0.0.weight"].shape[1],
             tensors[f"block{last}.lastconv.0.weight"].shape[1])  # fmt: skip
    assert sizes == FIRST_AND_LAST_INPUTS[version]
    assert tensors["block0.convblock.7.beta"].shape == (1, VERSIONS[version].widths[0], 1, 1)
    assert rife_version(tensors) == version
    assert rife_version({key: t for key, t in tensors.items() if key != "block2.conv0.1.0.bias"}) is None
    assert rife_version(tensors | {"block0.conv0.0.1.weight": torch.ones(96)}) is None  # PReLU: 4.0


@pytest.mark.numeric
@pytest.mark.parametrize("version", GOLDEN)
def test_golden_numbers(tmp_path, version):
    between = load_interpolator(saved(tmp_path, version))
    made = (between(*(ENDS * 2 - 1), torch.tensor([0.3])) + 1) / 2
    got = made[0, :, 9::23, 5::23].flatten() * 1000
    assert (got - torch.tensor(GOLDEN[version])).abs().max() < 1
    later = between(*(ENDS * 2 - 1), torch.tensor([0.8]))
    assert (later - (made * 2 - 1)).abs().max() > 0.01


@pytest.mark.parametrize("version", ["4.6", "4.15 to 4.17 lite", "4.25 lite"])
def test_without_last_layers_it_blends(tmp_path, version):
    """No flow and no preference: the mean of both neighbours, whatever the time; of odd sizes and in loops, too."""
    tensors = weights(version)
    none = {key: torch.zeros_like(t) for key, t in tensors.items() if ".lastconv." in key}
    between = load_interpolator(saved(tmp_path, version, **none))
    clip = texture_clip("pan", 0, frames=3, size=40)[..., :37]
    made = interpolate(clip, 2, loop=True, between=between)
    assert made.shape == (6, 3, 40, 37)
    assert torch.equal(made[::2], clip)
    around = torch.cat([clip, clip[:1]])
    assert (made[1::2].int() - blend(around).int()).abs().max() <= 1


def test_unknown_weights_are_refused(tmp_path):
    torch.save({"module.block_tea.conv0.0.0.weight": torch.zeros(3)}, tmp_path / "flownet.pkl")
    with pytest.raises(UserError, match=r"flownet.pkl, expected RIFE's weights of a version .*4\.6.*4\.25 lite.*FILM"):
        load_interpolator(tmp_path / "flownet.pkl")
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="x.pth"):
        load_interpolator(tmp_path / "x.pth")


class Mix(nn.Module):
    def forward(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        if a.shape[-1] % 64 or a.shape[-2] % 64:
            raise ValueError("sides have to be multiples of 64")
        return a + (b - a) * t[:, :, None, None]


class Half(nn.Module):
    def forward(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return a[..., ::2]


def test_a_program_in_torchscript(tmp_path):
    torch.jit.script(Mix()).save(str(tmp_path / "mix.pt"))
    between = load_interpolator(tmp_path / "mix.pt")
    clip = texture_clip("pan", 0, frames=3, size=40)
    made = interpolate(clip, 2, between=between)
    assert (made[1::2].int() - blend(clip).int()).abs().max() <= 1
    torch.jit.script(Half()).save(str(tmp_path / "half.pt"))
    with pytest.raises(UserError, match=r"half.pt, which gives shape \(2, 3, 64, 32\)"):
        interpolate(clip, 2, between=load_interpolator(tmp_path / "half.pt"))
