"""Stage `sparsectrl`: which frames are given, what learns, and that the file steers."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.checkpoints.sparsectrl_files import load_sparsectrl
from animatediff.config.networks import ScheduleConfig
from animatediff.config.prompt_yaml import load_config
from animatediff.lab.stage_table import load_train_config
from animatediff.media.video import read_video
from animatediff.models.sparsectrl_encoder import build_sparsectrl
from animatediff.pipeline.run import animate
from animatediff.training.diffusion_stages import DiffusionStage, freeze
from animatediff.training.sparsectrl_stage import SparseCtrlStage, draw_given, unfreeze_sparsectrl
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal, sparsectrl_tensors
from tests.media.videos import write
from tests.nano import entry, write_config, write_files

LOOP = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1}
KINDS = ("rgb", pytest.param("scribble", marks=pytest.mark.slow))


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("files"))
    for name in "abc":
        write(folder / f"videos/{name}.mp4", frames=6, caption=f"wall {name}")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "frame.png")
    return folder


def run(files: Path, folder: Path, kind: str, **values) -> Path:
    given = {
        "stage": "sparsectrl",
        "kind": kind,
        "output_dir": str(folder),
        "pretrained_model_path": str(files / "nano.safetensors"),
        "motion_module": str(files / "mm_v3.safetensors"),
        "train_data": {"video_folder": str(files / "videos"), "sample_size": 16, "sample_stride": 1}
        | {"sample_n_frames": 3},
        "threads": 1,
        "loop": LOOP,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(given | values))
    load_train_config(folder / "config.yaml").run(quiet)
    return folder / "sparsectrl.safetensors"


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> Callable[[str], Path]:
    return functools.cache(lambda kind: run(files, tmp_path_factory.mktemp(kind), kind))


# ---- which frames are given


def test_every_number_of_given_frames_is_as_likely():
    given = draw_given(8000, 4, torch.Generator().manual_seed(0))
    share = given.sum(dim=1).bincount(minlength=5) / 8000
    assert share[0] == 0 and torch.allclose(share[1:], torch.full((4,), 0.25), atol=0.02)
    alone = given[given.sum(dim=1) == 1].float().mean(dim=0)
    assert torch.allclose(alone, torch.full((4,), 0.25), atol=0.04)  # and every frame
    assert torch.equal(given, draw_given(8000, 4, torch.Generator().manual_seed(0)))


class Drawn:
    """A source of random clips; `condition` is all white."""

    names: list[str] = []

    def __init__(self, frames: int, size: int):
        self.frames, self.condition = frames, torch.ones(2, frames, size, size, dtype=torch.bool)

    def batch(self, index, batch_size, generator):
        return torch.randn(batch_size, self.frames, 4, 8, 8, generator=generator), torch.full((batch_size, 77), 5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_encoder_sees_and_what_learns(files, kind):
    """Zeros in frames that are not given; gradients in the zero convolutions at once, in the rest a step later."""
    base = load_base(files / "nano.safetensors")
    unet, _ = load_motion_module(base.unet, files / "mm_v3.safetensors")
    encoder = unfreeze_sparsectrl(build_sparsectrl(unet, kind, downsampling=base.vae.config.downsampling))
    freeze(unet, base.text_encoder)
    clips = Drawn(3, 8 * base.vae.config.downsampling)
    stage = SparseCtrlStage(
        "sparsectrl", unet, base.text_encoder, ScheduleConfig(), clips, trainable=encoder, save=lambda *_: None
    )
    seen = []
    embed = encoder.embed
    encoder.embed = lambda condition, given: seen.append((condition, given)) or embed(condition, given)
    stage.loss(0, 2, torch.Generator().manual_seed(3))[0].backward()
    ((condition, given),) = seen
    assert 0 < given.sum() < len(given)
    assert torch.equal(condition.flatten(1).abs().amax(dim=1) > 0, given)
    names = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in encoder.named_parameters()} - {"conv_in.weight"}
    heads = {name for name in names if name.startswith(("controlnet_down_blocks.", "controlnet_mid_block."))}
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == heads and all(p.grad is None for p in (*unet.parameters(), *base.text_encoder.parameters()))
    with torch.no_grad():
        for p in encoder.parameters():
            p -= 0.1 * (0 if p.grad is None else p.grad)
    encoder.zero_grad()
    stage.loss(1, 2, torch.Generator().manual_seed(4))[0].backward()
    assert encoder.conv_in.bias.grad.abs().max() > 0
    last = "controlnet_cond_embedding." + ("weight" if kind == "rgb" else "conv_out.weight")
    assert dict(encoder.named_parameters())[last].grad.abs().max() > 0


# ---- what comes out


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_official_and_only_the_encoder_learnt(files, trained, kind):
    base = load_base(files / "nano.safetensors")
    encoder, report = load_sparsectrl(trained(kind), base.unet, base.vae)
    official = {key for key in sparsectrl_tensors(kind) if not key.endswith("pos_encoder.pe")}
    assert encoder.config.kind == kind and read_state_dict(trained(kind)).tensors.keys() == official
    assert torch.allclose(encoder.conv_in.weight, base.unet.conv_in.weight, atol=1e-3)  # stored as float16
    fresh = build_sparsectrl(base.unet, kind, downsampling=base.vae.config.downsampling).state_dict()
    assert all((encoder.state_dict()[key] - fresh[key]).abs().max() > 1e-5 for key in fresh if "controlnet_" in key)
    saved = torch.load(trained(kind).parent / "state.pt", weights_only=True)["model"]
    assert saved.keys() == dict(encoder.named_parameters()).keys() - {"conv_in.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_steers(files, trained, tmp_path, kind):
    def frames(name: str, **values) -> torch.Tensor:
        config = write_config(tmp_path / f"{name}.yaml", entry(files, format="png", **values))
        folder = animate(load_config(config), output_dir=tmp_path / name, device="cpu")
        return read_video(next((folder / "sample").iterdir()))[0]

    steered = frames("steered", controlnet_path=str(trained(kind)), controlnet_images=[str(files / "frame.png")])
    assert not torch.equal(steered, frames("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_same_weights(files, trained, tmp_path, kind, monkeypatch):
    loss = DiffusionStage.loss

    def dies(self, index, *rest):
        if index == 1:
            raise InterruptedError
        return loss(self, index, *rest)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(DiffusionStage, "loss", dies)
        run(files, tmp_path, kind)
    again = run(files, tmp_path, kind)
    assert equal(*(read_state_dict(path).tensors for path in (trained(kind), again)))


@pytest.mark.slow
def test_options(files, trained, tmp_path):
    """Checkpointed layers give the same; a start from a file, an adapter, kept clips and the world do train."""
    same = run(files, tmp_path / "checkpointed", "scribble", gradient_checkpointing=True)
    ours, theirs = (read_state_dict(path).tensors for path in (same, trained("scribble")))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)
    adapter = str(files / "adapter.safetensors")
    run(files, tmp_path / "start", "scribble", init_from=str(same), adapter_lora_path=adapter, cache=True)
    lines = torch.load(tmp_path / "start/clips.pt", weights_only=True)["conditions"]
    assert lines.shape == (3, 3, 16, 2) and lines.dtype == torch.uint8
    run(files, tmp_path / "world", "scribble", train_data=None, world={"clips": 2})
    assert torch.load(tmp_path / "world/clips.pt", weights_only=True)["conditions"].any()


@pytest.mark.slow
def test_samples_during_training(files, trained, tmp_path):
    """They show the encoder that is being trained, which does not notice."""
    samples = {"every": 1, "prompt": "a", "steps": 1, "L": 2, "H": 16, "W": 16}
    samples["controlnet_images"] = str(files / "frame.png")
    same = run(files, tmp_path, "rgb", samples=samples)
    first, last = (read_video(tmp_path / f"samples/00000{step}-0.gif")[0] for step in (1, 2))
    assert not torch.equal(first, last)
    assert equal(*(read_state_dict(path).tensors for path in (trained("rgb"), same)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": {"every": 1, "prompt": "a", "H": 16, "W": 16}}, "samples: expected controlnet_images where"),
        ({"motion_module": "adapter"}, "domain adapter"),
        ({"init_from": "rgb"}, "init_from: got an encoder of kind rgb, expected scribble"),
    ],
)
def test_mistakes(files, trained, tmp_path, values, message):
    paths = {"adapter": str(files / "adapter.safetensors"), "rgb": str(trained("rgb"))}
    with pytest.raises(UserError, match=message):
        run(files, tmp_path, "scribble", **{key: paths.get(str(value), value) for key, value in values.items()})
