"""ControlNet and IP-Adapter on SDXL: through files, the command line and calls.

There are no numbers of other programs for these. What a ControlNet computes is the UNet's way down, whose numbers are
golden: with the UNet's own weights and no hint, its residuals have to be the UNet's skip connections.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from animatediff.checkpoints.controlnet_files import load_controlnet, save_controlnet
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.ip_adapter_files import load_ip_adapter, save_ip_adapter
from animatediff.checkpoints.load import load_base
from animatediff.media.video import read_video
from animatediff.models.controlnet_network import build_controlnet
from animatediff.models.ip_adapter_network import build_ip_adapter, cross_attentions, layer_weights
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from scripts import convert
from scripts.animate import main
from tests import nano, sdxl
from tests.checkpoints.synthetic import write
from tests.checkpoints.test_identify import CONTROL_TABLES
from tests.nano import write_config

SPELLINGS = ("controlnet.safetensors", "controlnet")  # the original keys, and diffusers' folder
ENCODER = str(Path(__file__).parents[2] / "animatediff/assets/shapes_encoder.safetensors")
SMALL = {"prompt": "a fox", "H": 64, "W": 96, "L": 3, "steps": 2, "seed": 3, "format": "png"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = sdxl.write_files(tmp_path_factory.mktemp("sdxl"))
    nano.write_files(folder)
    base = load_base(folder / "sdxl.safetensors")
    torch.manual_seed(0)
    network = build_controlnet(base.unet, downsampling=base.vae.config.downsampling)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save_controlnet(network, folder / "controlnet.safetensors")
    save_controlnet(network, folder / "controlnet")
    adapter = build_ip_adapter(base.unet, "base", encoder_width=64)
    save_ip_adapter(adapter, folder / "ip_adapter.safetensors", metadata={})
    Image.effect_noise((96, 64), 80).convert("RGB").save(folder / "picture.png")
    return folder


@torch.no_grad()
def test_a_copy_of_the_way_down_finds_the_unets_own_skips(files):
    base = load_base(files / "sdxl.safetensors")
    unet, network = base.unet, build_controlnet(base.unet, downsampling=base.vae.config.downsampling)
    for head in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.dirac_(head.weight)
    skips, middle = [], []
    hooks = [m.register_forward_hook(lambda m, i, o: skips.append(o)) for m in (unet.conv_in,)]
    for block in unet.down_blocks:
        last = block.attentions if block.attentions is not None else block.resnets
        layers = [*last, *(block.downsamplers or ())]
        hooks += [m.register_forward_hook(lambda m, i, o: skips.append(o)) for m in layers]
    hooks.append(unet.mid_block.register_forward_hook(lambda m, i, o: middle.append(o)))
    x, t = torch.randn(2, 3, 4, 8, 12), torch.tensor([481, 481])
    added = {"pooled": torch.randn(2, 40), "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)}
    context = torch.randn(2, 7, unet.config.context_dim)
    unet(x, t, context, **added)
    embedded = network.embed(torch.zeros(3, 3, 64, 96))
    down, mid = network(x, t, context, embedded, **added)
    assert len(down) == len(skips) == 9
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip([*down, mid], [*skips, *middle], strict=True))


def run(files: Path, tmp_path: Path, **values: object) -> torch.Tensor:
    base = {
        "pretrained_model_path": str(files / "sdxl.safetensors"),
        "motion_module": str(files / "sdxl-beta.safetensors"),
    }
    config = write_config(tmp_path / "run.yaml", base | SMALL | values)
    main(["--config", str(config), "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    (clip,) = (tmp_path / "out/sample").iterdir()
    return read_video(clip)[0]


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory) -> torch.Tensor:
    return run(files, tmp_path_factory.mktemp("plain"))


PICTURES = {
    "controlnet": lambda files: {
        "controlnet": {"path": str(files / "controlnet.safetensors"), "images": str(files / "picture.png")}
    },
    "diffusers' folder in windows": lambda files: {
        "controlnet": {"path": str(files / "controlnet"), "images": str(files / "picture.png")},
        "windows": {"schedule": "open", "length": 2, "overlap": 1},
    },
    "ip adapter": lambda files: {
        "ip_adapter": {"path": str(files / "ip_adapter.safetensors"), "images": str(files / "picture.png")},
        "image_encoder": ENCODER,
    },
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "windows" in n else n for n in PICTURES])
def test_through_the_command_line(files, tmp_path, plain, name):
    got = run(files, tmp_path, **PICTURES[name](files))
    assert got.shape == plain.shape and not torch.equal(got, plain)


@pytest.mark.slow
def test_scale_zero_changes_nothing_and_both_spellings_are_one(files, tmp_path):
    nets = [{"path": str(files / name), "images": str(files / "picture.png")} for name in SPELLINGS]
    results = []
    for net in (*nets, nets[0] | {"scale": 0.0}, None):
        values = {"controlnet": net} if net else {}
        base = {"pretrained_model_path": str(files / "sdxl.safetensors")} | SMALL | values
        pipe = AnimateDiffPipeline.from_config(write_config(tmp_path / "run.yaml", base), device="cpu")
        call = {"num_frames": 2, "num_inference_steps": 2, "output_type": "latent"}
        results.append(pipe("a fox", **call, generator=torch.Generator().manual_seed(1)).frames)
    file, folder, off, without = results
    assert torch.allclose(file, folder, atol=1e-5) and torch.equal(off, without) and not torch.allclose(file, off)


def test_identified_and_converted(files, tmp_path, monkeypatch):
    assert [identify(files / n).kind for n in SPELLINGS] == ["sdxl-controlnet"] * 2
    assert identify(files / "controlnet").base == "SDXL"
    monkeypatch.setattr(
        "sys.argv", ["convert.py", str(files / "controlnet"), str(tmp_path / "c.ckpt"), "--to", "controlnet"]
    )
    convert.main()
    base = load_base(files / "sdxl.safetensors")
    nets = [
        load_controlnet(path, base.unet, base.vae)[0]
        for path in (tmp_path / "c.ckpt", files / "controlnet.safetensors")
    ]
    a, b = (net.state_dict() for net in nets)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_presets_are_those_of_sdxl(files):
    unet = load_base(files / "sdxl.safetensors").unet
    for preset, block in (("style", "up_blocks.0.attentions.1"), ("composition", "down_blocks.2.attentions.1")):
        weights = dict(zip(cross_attentions(unet), layer_weights(unet, preset), strict=True))
        assert {name.split(".transformer")[0] for name, weight in weights.items() if weight} == {block}


@pytest.mark.parametrize(("name", "kind"), [("sdxl controlnet (diffusers)", "SDXL"), ("sdxl ip-adapter", "SDXL")])
def test_of_the_other_family_is_named_before_anything_is_loaded(files, tmp_path, monkeypatch, name, kind):
    """Released files of SDXL on SD 1.x, by a few of their keys."""
    monkeypatch.setattr("animatediff.pipeline.assemble.load_base", lambda path: pytest.fail("loaded"))
    path = write(tmp_path / "x.safetensors", {k: torch.zeros(s) for k, s in CONTROL_TABLES["recognise"][name].items()})
    entry = {"path": str(path), "images": str(files / "picture.png")}
    option = {"controlnet": entry} if "controlnet" in name else {"ip_adapter": entry, "image_encoder": ENCODER}
    with pytest.raises(UserError, match=f"this is an? .* for {kind}, but .*nano.* is of SD 1.x"):
        run(files, tmp_path, pretrained_model_path=str(files / "nano.safetensors"), motion_module="", **option)


def test_an_adapter_of_another_width_is_refused(files):
    with pytest.raises(UserError, match="got an IP-Adapter of context_dim 64, expected the base's 40"):
        load_ip_adapter(files / "ip_adapter.safetensors", load_base(files / "nano.safetensors").unet)
