"""The stages on top of an image model: what they train, that they go on, and that their files do what was learnt."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.load import load_base, load_motion_module, load_personalised
from animatediff.checkpoints.lora_files import read_lora
from animatediff.config.prompt_yaml import load_config
from animatediff.lab.stage_table import load_train_config
from animatediff.media.video import read_video
from animatediff.models.lora import LoRAStack
from animatediff.pipeline.run import animate
from animatediff.training import diffusion_stages
from animatediff.training.diffusion_stages import DiffusionStage
from animatediff.training.latents import LatentClips
from animatediff.training.lora_stages import attach_lora
from animatediff.utils import UserError
from animatediff.world.series import World
from scripts import train
from tests.checkpoints.synthetic import TABLES, equal
from tests.media.videos import write
from tests.nano import entry, write_config, write_files

CONFIGS = Path(__file__).parents[2] / "configs/train"
LOOP = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1}
STAGES = {  # stage -> its own values and the file it writes
    "image_finetune": ({"image_data": "images"}, "image.safetensors"),
    "image_lora": (
        {"image_data": "images", "rank": 2, "alpha": 1.0, "train_text_encoder": True, "convolutions": True},
        "lora.safetensors",
    ),
    "domain_adapter": ({"train_data": "videos", "rank": 3}, "adapter.safetensors"),
    "motion_lora": (
        {"train_data": "videos", "rank": 3, "motion_module": "mm_v2"},
        "motion_lora.safetensors",
    ),
}


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The golden network's files, a folder of videos and one of pictures."""
    folder = write_files(tmp_path_factory.mktemp("files"))
    (folder / "images").mkdir()
    for number, name in enumerate("abc"):
        write(folder / f"videos/{name}.mp4", frames=6, caption=f"wall {name}")
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{name}.png")
        (folder / f"images/{name}.txt").write_text(f"dots {name}")
    return folder


def config_file(files: Path, folder: Path, stage: str, **values) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "stage": stage,
        "output_dir": str(folder),
        "pretrained_model_path": str(files / "nano.safetensors"),
        "threads": 1,
        "loop": LOOP,
    }
    for key, value in (STAGES[stage][0] | values).items():
        given[key] = value
        if value == "images":
            given[key] = {"image_folder": str(files / "images"), "sample_size": 16}
        elif value == "videos":
            given[key] = {"video_folder": str(files / "videos"), "sample_size": 16, "sample_stride": 1}
            given[key] |= {"sample_n_frames": 2}
        elif key == "motion_module":
            given[key] = str(files / f"{value}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    return folder / "config.yaml"


def run(files: Path, folder: Path, stage: str, **values) -> Path:
    load_train_config(config_file(files, folder, stage, **values)).run(quiet)
    return folder / STAGES[stage][1]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> dict[str, Path]:
    return {stage: run(files, tmp_path_factory.mktemp(stage), stage) for stage in STAGES}


# ---- what comes out


@pytest.mark.slow
def test_a_finetuned_model_is_a_personalised_model(files, trained):
    base = load_base(files / "nano.safetensors")
    personal = load_personalised(trained["image_finetune"], base)
    assert personal.vae.config == base.vae.config and personal.unet.config == base.unet.config
    ours, theirs = (m.unet.state_dict() for m in (personal, base))
    changed = [bool((ours[key] - theirs[key]).abs().max() > 1e-3) for key in ours]
    assert sum(changed) > 0.9 * len(changed)
    for ours, theirs in ((personal.text_encoder, base.text_encoder), (personal.vae, base.vae)):
        assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("stage", "table"), [("domain_adapter", "domain_adapter"), ("motion_lora", "motion_lora")])
def test_official_key_grammars(trained, stage, table):
    assert read_state_dict(trained[stage]).tensors.keys() == TABLES[table].keys()


def test_kohya_key_grammar(files, trained):
    file = read_state_dict(trained["image_lora"])
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= file.tensors.keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in file.tensors
    assert file.tensors[f"{stem}.alpha"] == 1 and file.metadata["ss_network_dim"] == "2"
    lora = read_lora(trained["image_lora"])
    assert lora.kind == "lora" and {e.factor() for e in lora.entries} == {0.5} and not lora.unread
    ours = {key.removesuffix(".lora_down.weight") for key in file.tensors if key.endswith("down.weight")}
    theirs = {key.removesuffix(".lora_down.weight") for key in TABLES["kohya_lora"] if key.endswith("down.weight")}
    assert theirs <= ours


@pytest.mark.parametrize("stage", ["image_lora", pytest.param("domain_adapter", marks=pytest.mark.slow), "motion_lora"])
def test_a_file_does_what_was_learnt_and_nothing_at_scale_0(files, trained, stage, monkeypatch):
    """The network as it left the training, and the base with the file on it, predict the same."""
    kept = []
    monkeypatch.setattr(DiffusionStage, "names", lambda self: kept.append(self) or [])
    file = run(files, trained[stage].parent / "again", stage)
    x = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, t = torch.tensor([[49406, 320, 49407]]), torch.tensor([500])
    with torch.no_grad():
        learnt = kept[-1].unet(x, t, kept[-1].text_encoder(tokens))
        base = load_base(files / "nano.safetensors")
        unet, text = base.unet, base.text_encoder
        if stage == "motion_lora":
            unet, _ = load_motion_module(unet, files / "mm_v2.safetensors")
        before = unet(x, t, text(tokens))
        loras = LoRAStack(unet, text)
        report = loras.add(read_lora(file))
        assert not report.unused
        after = unet(x, t, text(tokens))
        loras.set_scale(loras.names[0], 0.0)
        torch.testing.assert_close(unet(x, t, text(tokens)), before)  # upsampled the plain way, under a LoRA
    change = (after - before).norm()
    assert change > 1e-4 * before.norm() and (after - learnt).norm() < 0.05 * change


@pytest.mark.slow
def test_all_of_them_animate_together(files, trained, tmp_path):
    values = {
        "dreambooth_path": str(trained["image_finetune"]),
        "lora_model_path": str(trained["image_lora"]),
        "adapter_lora_path": str(trained["domain_adapter"]),
        "motion_module": str(files / "mm_v2.safetensors"),
        "motion_module_lora_configs": [{"path": str(trained["motion_lora"]), "alpha": 0.5}],
    }
    config = write_config(tmp_path / "run.yaml", entry(files, format="png", **values))
    folder = animate(load_config(config), output_dir=tmp_path / "out", device="cpu")
    assert len(read_video(next((folder / "sample").iterdir()))[0]) == 2


# ---- how it learns


@pytest.mark.parametrize(
    "stage", ["image_lora", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES if s != "image_lora")]
)
def test_a_killed_run_goes_on_to_the_same_weights(files, trained, tmp_path, stage, monkeypatch):
    loss = DiffusionStage.loss

    def dies(self, index, *rest):
        if index == 1:
            raise InterruptedError
        return loss(self, index, *rest)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(DiffusionStage, "loss", dies)
        run(files, tmp_path, stage)
    file = run(files, tmp_path, stage)
    one, two = (torch.load(path.parent / "state.pt", weights_only=True) for path in (trained[stage], file))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    assert equal(*(read_state_dict(path).tensors for path in (trained[stage], file)))


def test_only_the_lora_learns(files):
    base = load_base(files / "nano.safetensors")
    for network in (base.unet, base.text_encoder):
        network.requires_grad_(False)
    lora = attach_lora("domain-adapter", base.unet, rank=4)
    context = torch.randn(1, 5, base.unet.config.context_dim)
    base.unet(torch.randn(1, 1, 4, 8, 8), torch.tensor([3]), context).square().sum().backward()
    assert all(change.up.grad.abs().max() > 0 for change in lora.attached.changes)
    assert not any(p.requires_grad for p in base.unet.parameters())
    assert len(lora.attached.changes) == len(TABLES["domain_adapter"]) // 2


@pytest.mark.slow
def test_samples_during_training(files, trained, tmp_path):
    """They are drawn, and the training does not notice."""
    samples = {"every": 1, "prompt": ["a", "b"], "steps": 1, "L": 2, "H": 16, "W": 16}
    file = run(files, tmp_path, "motion_lora", samples=samples)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        f"{s:06d}-{i}.gif" for s in (1, 2) for i in (0, 1)
    ]
    assert equal(*(read_state_dict(path).tensors for path in (trained["motion_lora"], file)))


@pytest.mark.parametrize("cache", [False, True])
def test_a_loss_that_is_not_finite_names_the_files(files, tmp_path, monkeypatch, cache):
    real = diffusion_stages.denoising_loss
    monkeypatch.setattr(diffusion_stages, "denoising_loss", lambda *rest: real(*rest) * float("inf"))
    with pytest.raises(
        UserError, match=r"got loss inf at step 0 of image_finetune \(the batch: \S*/images/[abc].png, \S*/[abc].png\)"
    ):
        run(files, tmp_path, "image_finetune", cache=cache)


# ---- Shapes, the toy data set


def test_the_world_as_a_source(files, tmp_path):
    vae = load_base(files / "nano.safetensors").vae
    plain, other = World(3), World(3, style="neon", watermark=True, motions=("zoom_in", "left"))
    assert [other.scene(i).motion for i in range(3)] == ["zoom_in", "left", "zoom_in"]
    clips = LatentClips.of_world(tmp_path / "clips.pt", vae, plain, log=quiet)
    styled = LatentClips.of_world(tmp_path / "clips.pt", vae, other, log=quiet)  # another world: encoded anew
    assert not torch.equal(clips.latents, styled.latents) and not torch.equal(clips.tokens, styled.tokens)
    styled.single_frames = True
    latents, tokens = styled.batch(0, 2, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 1, 4, 8, 8) and tokens.shape == (2, 77) and len(styled.names) == 2


def test_latents_of_another_vae_are_not_taken(files, tmp_path):
    vae, path, world = load_base(files / "nano.safetensors").vae, tmp_path / "clips.pt", World(1)
    first = LatentClips.of_world(path, vae, world, log=quiet)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1  # which encodes nothing
        written = path.stat().st_mtime_ns
        assert torch.equal(LatentClips.of_world(path, vae, world, log=quiet).latents, first.latents)
        assert path.stat().st_mtime_ns == written
        vae.encoder.conv_out.bias += 1
        assert not torch.equal(LatentClips.of_world(path, vae, world, log=quiet).latents, first.latents)


def test_a_style_is_learnt_from_the_world(files, tmp_path):
    file = run(files, tmp_path, "image_lora", image_data=None, world={"clips": 2, "style": "hatched"})
    assert read_lora(file).kind == "lora"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"style": "oil"}, "style: got 'oil', expected one of plain, neon"),
        ({"motions": ["spin"]}, "motions: got 'spin', expected motions of the data set: still"),
        ({"clips": 0}, "clips: got 0, expected at least 1"),
    ],
)
def test_other_worlds(values, message):
    with pytest.raises(UserError, match=message):
        World(**{"clips": 1} | values)


# ---- mistakes


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("image_lora", {"image_data": None}, "got 0 of train_data"),
        ("image_lora", {"world": {"clips": 1}}, "got 2 of train_data"),
        ("image_lora", {"rank": 0}, "rank: got 0, expected at least 1"),
        ("image_lora", {"alpha": 0.0}, "alpha: got 0.0, expected more than 0"),
        ("image_finetune", {"threads": -1}, "threads: got -1, expected at least 0"),
        ("image_finetune", {"seed": -1}, "seed: got -1, expected at least 0"),
        ("motion_lora", {"noisy_share": 7.0}, "noisy_share: got 7.0, expected at most 1"),
        (
            "motion_lora",
            {"samples": {"every": 1, "prompt": "a", "guidance_scale": -1}},
            "guidance_scale: got -1, expected",
        ),
        ("motion_lora", {"samples": {"every": 1, "prompt": "a", "fps": 0}}, "samples: fps: got 0 for gif"),
        ("motion_lora", {"train_data": None, "world": {"clips": 1, "seed": -1}}, "world: seed: got -1, expected 0"),
        ("motion_lora", {"train_data": None, "image_data": "images"}, "got image_data for a stage that learns motion"),
        ("motion_lora", {"motion_module": "adapter"}, "domain adapter"),
        (
            "motion_lora",
            {"samples": {"every": 1, "prompt": "a", "H": 20}},
            "H: got 20, expected a multiple of 8",
        ),
        ("motion_lora", {"samples": {"every": 1, "prompt": "a", "L": 99}}, "samples: L: got 99, expected at most 32"),
    ],
)
def test_mistakes(files, tmp_path, stage, values, message):
    with pytest.raises(UserError, match=message):
        run(files, tmp_path, stage, **values)


def test_check_data_of_pictures(files, tmp_path, capsys):
    train.main(["--config", str(config_file(files, tmp_path, "image_lora")), "--check-data"])
    assert capsys.readouterr().out == "3 of 3 pictures can be used\n"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/page.png").write_text("<html>")
    bad = config_file(files, tmp_path, "image_lora", image_data={"image_folder": str(tmp_path / "pictures")})
    with pytest.raises(UserError, match="^got 1 pictures of which none can be used, expected some: see the report$"):
        train.main(["--config", str(bad), "--check-data"])
    assert capsys.readouterr().out.startswith("0 of 1 pictures can be used\nno caption: 1\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path):
    config = load_train_config(path)
    assert config.output_dir == f"outputs/{path.stem}"
