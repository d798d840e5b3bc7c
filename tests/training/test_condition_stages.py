"""Stages `controlnet` and `ip_adapter`: what learns, and that the file steers through the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from animatediff.checkpoints.controlnet_files import load_controlnet
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.image_encoder_files import load_image_encoder
from animatediff.checkpoints.ip_adapter_files import load_ip_adapter
from animatediff.checkpoints.load import load_base
from animatediff.config.networks import ScheduleConfig
from animatediff.config.prompt_yaml import load_config
from animatediff.lab.stage_table import load_train_config
from animatediff.media.video import read_video
from animatediff.models.controlnet_network import build_controlnet
from animatediff.models.ip_adapter_network import build_ip_adapter
from animatediff.pipeline.run import animate
from animatediff.training.controlnet_stage import ControlNetStage
from animatediff.training.diffusion_stages import freeze
from animatediff.training.ip_adapter_stage import IPAdapterStage
from animatediff.utils import UserError
from tests.nano import entry, write_config, write_files

ENCODER = str(Path(__file__).parents[2] / "animatediff/assets/shapes_encoder.safetensors")
LOOP = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1}
STAGES = {
    "controlnet": ({}, "controlnet.safetensors", "controlnet_images"),
    "ip_adapter": ({"image_encoder": ENCODER}, "ip_adapter.safetensors", "ip_adapter_images"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("files"))
    for name in "ab":
        pixels = np.random.default_rng(len(name)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"pictures/{name}.png")
        (folder / f"pictures/{name}.txt").write_text(f"wall {name}")
    return folder


def run(files: Path, folder: Path, stage: str, **values) -> Path:
    own, name, images = STAGES[stage]
    given = {
        "stage": stage,
        "output_dir": str(folder),
        "pretrained_model_path": str(files / "nano.safetensors"),
        "image_data": {"image_folder": str(files / "pictures"), "sample_size": 16},
        "num_workers": 0,
        "samples": {"every": 2, "prompt": "a", "steps": 1, "L": 1, "H": 16, "W": 16}
        | {images: str(files / "pictures/a.png")},
        "loop": LOOP,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(given | own | values))
    load_train_config(folder / "config.yaml").run(lambda line: None)
    return folder / name


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> dict[str, Path]:
    return {stage: run(files, tmp_path_factory.mktemp(stage), stage) for stage in STAGES}


class Drawn:
    """A source of random frames."""

    names: list[str] = []
    empty = torch.full((77,), 7)

    def __init__(self, condition):
        self.condition = condition

    def batch(self, index, batch_size, generator):
        return torch.randn(batch_size, 1, 4, 8, 8, generator=generator), torch.full((batch_size, 77), 5)


def test_what_learns(files):
    """The image model stays; each video's own hint or picture reaches it, also in a batch."""
    base = load_base(files / "nano.safetensors")
    freeze(base.unet, base.text_encoder)
    side = 8 * base.vae.config.downsampling
    network = build_controlnet(base.unet, downsampling=base.vae.config.downsampling)
    adapter = build_ip_adapter(base.unet, "base", encoder_width=16)
    common = dict(schedule=ScheduleConfig(), save=lambda *_: None, caption_dropout=0.5)
    hints, features = torch.rand(2, 1, side, side) > 0.5, torch.randn(2, 1, 16)
    networks = ("", base.unet, base.text_encoder)
    nothing = torch.zeros(1, 16)
    for stage in (
        ControlNetStage(*networks, clips=Drawn(hints), trainable=network, **common),
        IPAdapterStage(*networks, clips=Drawn(features), trainable=adapter, nothing=nothing, **common),
    ):
        stage.loss(0, 2, torch.Generator().manual_seed(4))[0].backward()
        assert all(p.grad is None for p in (*base.unet.parameters(), *base.text_encoder.parameters()))
    assert network.controlnet_mid_block.weight.grad.abs().max() > 0 and network.conv_in.weight.requires_grad
    assert not [name for name, p in adapter.named_parameters() if not p.grad.abs().max()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01
        x, t, context = (
            torch.randn(2, 1, 4, 8, 8),
            torch.tensor([500, 500]),
            torch.randn(2, 77, base.unet.config.context_dim),
        )
        embedded = network.embed(hints[:, 0, None].expand(-1, 3, -1, -1).float())
        both = network(x, t, context, embedded)[1]
        each = [network(x[i : i + 1], t[:1], context[i : i + 1], embedded[i : i + 1])[1] for i in range(2)]
        assert torch.allclose(both, torch.cat(each), atol=1e-5)


def test_the_files_are_what_released_ones_are(files, trained):
    base = load_base(files / "nano.safetensors")
    network, _ = load_controlnet(trained["controlnet"], base.unet, base.vae)
    fresh = build_controlnet(base.unet, downsampling=base.vae.config.downsampling).state_dict()
    assert all((network.state_dict()[key] - fresh[key]).abs().max() > 1e-5 for key in fresh if "controlnet_down" in key)
    adapter, _ = load_ip_adapter(trained["ip_adapter"], base.unet)
    assert adapter.config.variant == "base" and adapter.config.encoder_width == 64
    assert [identify(trained[stage]).kind for stage in STAGES] == ["controlnet", "ip-adapter"]
    assert all(len(list((trained[stage].parent / "samples").iterdir())) == 1 for stage in STAGES)


def test_the_files_steer(files, trained, tmp_path):
    def frames(name: str, **values) -> torch.Tensor:
        config = write_config(tmp_path / f"{name}.yaml", entry(files, format="png", **values))
        folder = animate(load_config(config), output_dir=tmp_path / name, device="cpu")
        return read_video(next((folder / "sample").iterdir()))[0]

    plain, picture = frames("plain"), str(files / "pictures/a.png")
    hinted = frames("hinted", controlnet={"path": str(trained["controlnet"]), "images": picture})
    prompted = frames(
        "prompted", ip_adapter={"path": str(trained["ip_adapter"]), "images": picture}, image_encoder=ENCODER
    )
    assert not torch.equal(plain, hinted) and not torch.equal(plain, prompted)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plus", "full"])
def test_the_other_variants_train(files, tmp_path, variant):
    path = run(files, tmp_path, "ip_adapter", variant=variant, cache=True)
    adapter, _ = load_ip_adapter(path, load_base(files / "nano.safetensors").unet)
    width = load_image_encoder(ENCODER).width
    assert adapter.config.variant == variant and adapter.config.encoder_width == width
    assert torch.load(tmp_path / "clips.pt", weights_only=True)["conditions"].shape == (2, 1, 16, width)


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("controlnet", {"samples": {"every": 1, "prompt": "a", "H": 16, "W": 16}}, "expected controlnet_images"),
        ("controlnet", {"init_from": "ip_adapter"}, "IP-Adapter"),
        ("ip_adapter", {"init_from": "ip_adapter", "variant": "full"}, "init_from: got an adapter of variant base"),
        ("ip_adapter", {"image_encoder": "controlnet"}, "expected a CLIP vision model"),
    ],
)  # fmt: skip
def test_mistakes(files, trained, tmp_path, stage, values, message):
    paths = {name: str(path) for name, path in trained.items()}
    values = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(UserError, match=message):
        run(files, tmp_path, stage, **values)
