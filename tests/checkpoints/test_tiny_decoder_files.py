"""TAESD's decoder: the author's file, diffusers' folder, which one is for which family, and what it makes."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from animatediff.checkpoints.tiny_decoder_files import find_tiny_decoder, load_tiny_decoder
from animatediff.utils import UserError
from tests.golden.synthetic_weights import synthetic_tensor

CONVS, BLOCKS, FREE_OF_BIAS = (1, 7, 12, 17, 19), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), (7, 12, 17)
GOLDEN = (-1513, -1388, -864, -1582, -1413, -764, -999, -1140, -882, -1105, -1161, -974, -1037, -1120, -749, -866,
          -985, -1092, -679, -580, -733, -661, -483, -507, -1110, -1156, -969)  # fmt: skip  # of the author's network


def published() -> dict[str, Tensor]:
    """Every weight of taesd_decoder.pth: places in the author's list of layers."""
    widths = {1: (64, 4), 19: (3, 64)}
    shapes = {f"{i}.weight": (*widths.get(i, (64, 64)), 3, 3) for i in CONVS}
    shapes |= {f"{i}.bias": widths.get(i, (64,))[:1] for i in CONVS if i not in FREE_OF_BIAS}
    for i in BLOCKS:
        for j in (0, 2, 4):
            shapes |= {f"{i}.conv.{j}.weight": (64, 64, 3, 3), f"{i}.conv.{j}.bias": (64,)}
    made = {key: torch.from_numpy(synthetic_tensor("taesd", key, shape)) for key, shape in shapes.items()}
    return {key: t * 0.9 if t.dim() > 1 else t for key, t in made.items()}


@pytest.mark.numeric
def test_golden_numbers_of_both_layouts(tmp_path):
    tensors, latents = published(), torch.linspace(-4, 4, 24).reshape(1, 4, 3, 2)
    torch.save(tensors, tmp_path / "taesd_decoder.pth")
    (tmp_path / "taesd").mkdir()
    renamed = {f"decoder.layers.{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": t for k, t in tensors.items()}
    save_file(renamed | {"encoder.layers.0.bias": torch.zeros(64)},
              tmp_path / "taesd/diffusion_pytorch_model.safetensors")  # fmt: skip
    for name in ("taesd_decoder.pth", "taesd"):
        with torch.no_grad():
            made = load_tiny_decoder(tmp_path / name)(latents)
        assert made.shape == (1, 3, 24, 16)
        assert (made[0, :, 5::9, 3::6].flatten() * 1000 - torch.tensor(GOLDEN)).abs().max() < 1


def test_only_its_name_tells_the_family(tmp_path):
    for name in ("taesdxl_decoder.safetensors", "taesd_decoder.pth", "taef1_decoder.pth"):
        (tmp_path / name).touch()
    assert find_tiny_decoder(tmp_path, sdxl=True) == tmp_path / "taesdxl_decoder.safetensors"
    assert find_tiny_decoder(tmp_path, sdxl=False) == tmp_path / "taesd_decoder.pth"
    assert find_tiny_decoder(tmp_path / "nothing", sdxl=False) is None


def test_other_files_are_refused(tmp_path):
    tensors = published()
    of_more_channels = {"1.weight": torch.zeros(64, 16, 3, 3)}  # TAESD3, TAEF1
    for name, content in {"more": tensors | of_more_channels, "less": {"1.bias": tensors["1.bias"]}}.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=f"{name}.pth, expected a complete TAESD decoder"):
            load_tiny_decoder(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="expected diffusers' AutoencoderTiny"):
        load_tiny_decoder(tmp_path)
