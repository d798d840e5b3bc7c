"""LoRAs of every algorithm: they begin as nothing, are trained, and are read back as they were."""

import pytest
import torch

from animatediff.checkpoints.lora_files import in_dialect, read_lora, write_lora
from animatediff.config.networks import MotionConfig, TextConfig, UNetConfig
from animatediff.models.lora import LoRAStack
from animatediff.models.text import TextEncoder
from animatediff.models.unet import UNet
from animatediff.training.lora_stages import attach_lora, factors
from animatediff.utils import UserError

SIZES = {"block_out_channels": (8, 16), "attention_levels": (False, True), "layers_per_block": 1, "context_dim": 8}
CONFIG = UNetConfig(**SIZES, num_heads=2, norm_num_groups=4).with_motion(MotionConfig(version="v2", num_heads=2))
TEXT = TextConfig(width=8, layers=1, num_heads=2, mlp_width=16)


def networks() -> tuple[UNet, TextEncoder]:
    torch.manual_seed(0)
    unet, text = UNet(CONFIG), TextEncoder(TEXT)
    for module in unet.modules():  # so that the motion modules act
        if hasattr(module, "temporal_transformer"):
            module.temporal_transformer.proj_out.reset_parameters()
    return unet.requires_grad_(False), text.requires_grad_(False)


def output(unet: UNet, text: TextEncoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 4, 4, 4, generator=generator)
    return unet(x, torch.tensor([500]), text(torch.arange(77)[None]))


QUICK = (("locon", "lora"), ("dora", "motion-lora"))
ALL = [(algorithm, kind) for kind in ("lora", "motion-lora") for algorithm in ("lora", "locon", "loha", "lokr", "dora")]


@pytest.mark.parametrize(
    ("algorithm", "kind"), [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL]
)
def test_an_algorithm(tmp_path, kind, algorithm):
    unet, text = networks()
    plain = output(unet, text)
    given = {"text_encoder": text, "alpha": 2.0} if kind == "lora" else {}
    torch.manual_seed(2)
    lora = attach_lora(kind, unet, rank=4, algorithm=algorithm, **given)
    # a DoRA divides by norms and multiplies by the same: a rounding in each weight, and the network's sums of it
    torch.testing.assert_close(output(unet, text), plain, rtol=0, atol=1e-5 if algorithm == "dora" else 0)
    optimizer = torch.optim.SGD(lora.attached.parameters(), lr=1.0)
    for _ in range(2):  # the first moves what was zero alone
        optimizer.zero_grad()
        output(unet, text).square().mean().backward()
        assert all(p.grad is not None for p in lora.attached.parameters())
        optimizer.step()
    trained = output(unet, text).detach()
    assert (trained - plain).abs().max() > 1e-4
    path = lora.save(tmp_path / "lora.safetensors", {})
    read = read_lora(path)
    assert not read.unread and {entry.target for entry in read.entries} == {entry.target for entry in lora.lora.entries}
    assert any("_conv" in entry.target for entry in read.entries) == (kind == "lora" and algorithm == "locon")
    fresh, fresh_text = networks()
    report = LoRAStack(fresh, fresh_text).add(read)
    assert report.applied == report.total
    # float16 keeps 11 bits of every trained number
    moved = (trained - plain).abs().max().item()
    torch.testing.assert_close(
        output(fresh, fresh_text), trained, rtol=0, atol=2**-8 * max(moved, plain.abs().max().item())
    )
    if (algorithm, kind) in QUICK:
        fresh, fresh_text = networks()
        given = {"text_encoder": fresh_text, "alpha": 2.0} if kind == "lora" else {}
        again = attach_lora(kind, fresh, rank=4, algorithm=algorithm, init_from=str(path), **given)
        assert again.save(tmp_path / "again.safetensors", {}).read_bytes() == path.read_bytes()
        assert all(p.requires_grad for p in again.attached.parameters())


def test_a_lora_to_go_on_from_may_be_of_another_dialect(tmp_path):
    lora = attach_lora("lora", networks()[0], rank=4, convolutions=True)
    for parameter in lora.attached.parameters():
        torch.nn.init.normal_(parameter)
    path, other = lora.save(tmp_path / "kohya.safetensors", {}), tmp_path / "diffusers.safetensors"
    write_lora(in_dialect(read_lora(path), "diffusers"), other)
    again = attach_lora("lora", networks()[0], rank=4, convolutions=True, init_from=str(other))
    assert again.save(tmp_path / "again.safetensors", {}).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"rank": 2},
            "got lora of down 2x16, up 16x2, times 1 in unet.*, expected lora of down 4x16, up 16x4, times 1: set",
        ),
        ({"alpha": 2.0}, "times 0.5 in unet.*, expected .*, times 1: set"),
        ({"algorithm": "dora"}, "got lora of down 4x16, magnitude 16, up 16x4, times 1 in"),
        (
            {"convolutions": True},
            "got a LoRA on 79 layers, expected the 48 of this stage: unet.down_.* is in one of them",
        ),
    ],
)
def test_a_lora_to_go_on_from_is_of_the_same_form(tmp_path, other, message):
    path = attach_lora("lora", networks()[0], **{"rank": 4} | other).save(tmp_path / "lora.safetensors", {})
    with pytest.raises(UserError, match=f"init_from: .*{message}"):
        attach_lora("lora", networks()[0], rank=4, init_from=str(path))


def test_factors():
    assert [factors(n) for n in (320, 1280, 7, 1, 768)] == [(16, 20), (32, 40), (1, 7), (1, 1), (24, 32)]
