"""ControlNet against the numbers of diffusers and the original code; a freshly built one changes nothing."""

import pytest
import torch
from einops import rearrange

from animatediff.checkpoints.controlnet_files import load_controlnet
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.config.networks import ControlNetConfig
from animatediff.models.controlnet_network import ControlNet, guess_weights
from tests.checkpoints.synthetic import write
from tests.control import CONFIG, EXPECTED, controlnet_tensors, hint, per_part, video
from tests.models.test_golden import assert_close
from tests.nano import write_files

T = torch.tensor([481, 481])
CONTEXT = EXPECTED["input.context"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    base = load_base(folder / "nano.safetensors")
    nets = [
        load_controlnet(write(folder / f"{salt}.safetensors", controlnet_tensors(salt)), base.unet, base.vae)[0]
        for salt in ("nano-control", "nano-control-b")
    ]
    return base.unet, load_motion_module(base.unet, folder / "mm_v3.safetensors")[0], *nets


def residuals(net: ControlNet, t: torch.Tensor = T, name: str = "input.hint") -> list[torch.Tensor]:
    down, mid = net(video("input.latents"), t, CONTEXT, net.embed(hint(name)))
    return [*down, mid]


def predict(unet, added: list[torch.Tensor], t: torch.Tensor = T) -> torch.Tensor:
    return unet(video("input.latents"), t, CONTEXT, down_residuals=added[:-1], mid_residual=added[-1])


@torch.no_grad()
def test_residuals(networks):
    unet, _, net, _ = networks
    assert_close(net.embed(hint()), rearrange(EXPECTED["control.hint_embedding"], "1 c f h w -> f c h w"))
    down, mid = net(video("input.latents")[:1], T[:1], CONTEXT[:1], net.embed(hint()))
    assert len(down) == 12
    for i, residual in enumerate(down):
        assert_close(residual, rearrange(video(f"control.down.{i}"), "b f ... -> (b f) ..."))
    assert_close(mid, rearrange(video("control.mid"), "b f ... -> (b f) ..."))


@pytest.mark.parametrize(("t", "name"), [(481, "control.unet_0.8"), (981, "control.unet_0.8.t981")])
@torch.no_grad()
def test_image_model(networks, t, name):
    unet, _, net, _ = networks
    t = torch.tensor([t, t])
    assert_close(predict(unet, [0.8 * r for r in residuals(net, t)], t), video(name))


@torch.no_grad()
def test_scales(networks):
    """Per frame, lower for fine layers, the conditional half alone, and two networks together."""
    unet, _, net, other = networks
    added = residuals(net)
    per_frame = torch.tensor(CONFIG["frame_scales"]).repeat(2)[:, None, None, None]
    assert_close(predict(unet, [per_frame * r for r in added]), video("control.unet_frame_scales"))
    soft = [0.825 ** (12 - i) for i in range(13)]  # the original's guess mode, for both entries
    assert_close(predict(unet, [0.8 * s * r for s, r in zip(soft, added, strict=True)]), video("control.unet_soft"))
    half = per_part(0.0, 0.8)
    guess = [half * s * r for s, r in zip(guess_weights(13), added, strict=True)]
    assert_close(predict(unet, guess), video("control.unet_guess"))
    both = [0.8 * a + 0.5 * b for a, b in zip(added, residuals(other, name="input.hint_b"), strict=True)]
    assert_close(predict(unet, both), video("control.unet_two"))


@torch.no_grad()
def test_pooled_residuals_are_one_pixel(networks):
    unet, _, net, _ = networks
    pooled = ControlNet(ControlNetConfig(unet=net.config.unet, hint_widths=net.config.hint_widths, pooled=True))
    pooled.load_state_dict(net.state_dict())
    added = residuals(pooled)
    assert {r.shape[-2:] for r in added} == {(1, 1)}
    assert_close(predict(unet, [per_part(0.0, 0.8) * r for r in added]), video("control.unet_pooled"))


@torch.no_grad()
def test_video_model(networks):
    _, unet, net, _ = networks
    assert_close(predict(unet, [0.8 * r for r in residuals(net)]), video("control.unet_v3"))


def test_size_of_the_released_files():
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig())
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (361_279_120, 340)


@torch.no_grad()
def test_a_fresh_one_changes_nothing(networks):
    net = ControlNet(networks[2].config)
    assert not any(r.any() for r in residuals(net))
