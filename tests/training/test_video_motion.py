"""Stage `motion_module`: from video files and an image model to a motion module that animates."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from animatediff.checkpoints.files import read_state_dict
from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.config.networks import MOTION_VERSIONS, ScheduleConfig, TextConfig, UNetConfig
from animatediff.config.prompt_yaml import load_config
from animatediff.lab.stage_table import load_train_config
from animatediff.media.video import read_video
from animatediff.models.text import TextEncoder
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.unet import UNet
from animatediff.pipeline.run import animate
from animatediff.training import latents
from animatediff.training.data.clips import ClipConfig, Clips
from animatediff.training.data.reader import ClipReader
from animatediff.training.diffusion_stages import (
    DiffusionStage,
    checkpoint_activations,
    freeze,
    insert_motion,
    unfreeze_motion_modules,
)
from animatediff.training.latents import LatentClips, StreamedClips, in_chunks
from animatediff.training.stages import MotionModule
from animatediff.utils import UserError
from scripts import train
from tests.media.videos import write
from tests.nano import entry, write_config, write_files

CONFIGS = Path(__file__).parents[2] / "configs/train"
DATA = {"sample_size": 16, "sample_stride": 1, "sample_n_frames": 2}
LOOP = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1}
UNLEARNT = LOOP | {"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The golden network's files, and a folder `videos` of three short ones."""
    folder = write_files(tmp_path_factory.mktemp("files"))
    for name in "abc":
        write(folder / f"videos/{name}.mp4", frames=6, caption=f"wall {name}")
    return folder


def config_file(files: Path, folder: Path, **values) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "stage": "motion_module",
        "output_dir": str(folder),
        "pretrained_model_path": str(files / "nano.safetensors"),
        "train_data": DATA | {"video_folder": str(files / "videos")},
        "threads": 1,
        "loop": LOOP,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(given | values))
    return folder / "config.yaml"


def config(files: Path, folder: Path, **values) -> MotionModule:
    return load_train_config(config_file(files, folder, **values))


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train.main(["--config", str(config_file(files, folder, version="v2")), "--device", "cpu"])
    return folder / "motion.safetensors"


def motion_stage(**options) -> DiffusionStage:
    """Two levels of random weights, with motion modules that are no longer the identity, and clips of noise."""
    torch.manual_seed(0)
    image = UNetConfig(block_out_channels=(16, 32), attention_levels=(True, False), context_dim=8, norm_num_groups=4)
    unet, text_encoder = insert_motion(UNet(image), MOTION_VERSIONS["v3"]), TextEncoder(TextConfig(49408, 8, 1, 2, 16))
    for name, parameter in unet.named_parameters():
        if "temporal_transformer.proj_out.weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    noise = torch.randn(2, 2, 4, 8, 8).half()
    tokens = Tokenizer()(["", "a", "b"])[:, 0].int()
    clips = LatentClips(noise, tokens[1:], tokens[0])
    freeze(unet, text_encoder)
    learns = unfreeze_motion_modules(unet)
    return DiffusionStage("m", unet, text_encoder, ScheduleConfig(), clips, trainable=learns, save=print, **options)


def unread():
    """Batches that nobody may ask for."""
    raise LookupError
    yield


def loss_and_gradients(stage: DiffusionStage) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = stage.loss(0, 2, torch.Generator().manual_seed(0))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in stage.modules().named_parameters() if p.grad is not None}


# ---- what comes out


def test_it_animates(files, trained, tmp_path):
    """The official keys of v2, through the very config that a user writes."""
    assert read_state_dict(trained).tensors.keys() == read_state_dict(files / "mm_v2.safetensors").tensors.keys()
    run = write_config(tmp_path / "run.yaml", entry(files, motion_module=str(trained), format="png"))
    folder = animate(load_config(run), output_dir=tmp_path / "out", device="cpu")
    assert len(read_video(next((folder / "sample").iterdir()))[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_versions(files, tmp_path, version):
    config(files, tmp_path, version=version, cache=True, loop=UNLEARNT).run(quiet)
    unet, report = load_motion_module(load_base(files / "nano.safetensors").unet, tmp_path / "motion.safetensors")
    assert report.version == version and unet.config.motion == MOTION_VERSIONS[version]


@pytest.mark.slow
def test_it_goes_on_from_a_file(files, trained, tmp_path):
    config(files, tmp_path, init_from=str(trained), loop=UNLEARNT).run(quiet)
    old, new = (read_state_dict(path).tensors for path in (trained, tmp_path / "motion.safetensors"))
    assert old.keys() == new.keys() and all(torch.allclose(old[k], new[k], atol=1e-4) for k in old)


@pytest.mark.slow
def test_the_domain_adapter_is_active_and_not_trained(files, tmp_path):
    """The loss of the first step, at which a fresh module does nothing, is another one."""
    lines = {"": [], str(files / "adapter.safetensors"): []}
    for number, (path, log) in enumerate(lines.items()):
        config(files, tmp_path / str(number), adapter_lora_path=path, loop=UNLEARNT).run(log.append)
    plain, adapted = lines.values()
    assert adapted[0].startswith("domain-adapter adapter: applied") and adapted[-1] != plain[-1]
    plain, adapted = (read_state_dict(tmp_path / f"{i}/motion.safetensors").tensors for i in (0, 1))
    assert plain.keys() == adapted.keys()


# ---- what it learns from


def test_cached_clips_are_those_that_are_streamed(files, tmp_path):
    """Encoded once, or as they are needed: the same latents and captions."""
    data = config(files, tmp_path).train_data
    vae, tokenizer = load_base(files / "nano.safetensors").vae, Tokenizer()
    reader = ClipReader(Clips(data, seed=5), num_workers=2)
    made = {"count": 3, "log": quiet}
    cached = LatentClips.build(tmp_path / "clips.pt", {"key": 1}, reader.batches(in_chunks(3)), vae, tokenizer, **made)
    streamed = StreamedClips(ClipReader(Clips(data, seed=5), num_workers=2), vae, tokenizer)
    for index in range(3):
        generator = torch.Generator().manual_seed(1)  # which drops no caption
        found, tokens = streamed.batch(index, 1, generator)
        assert torch.allclose(found[0], cached.latents[index].float(), atol=1e-2)
        assert torch.equal(tokens[0].int(), cached.tokens[index])
    again = LatentClips.build(tmp_path / "clips.pt", {"key": 1}, unread(), vae, tokenizer, **made)
    assert torch.equal(again.latents, cached.latents)
    with pytest.raises(LookupError):  # another key: the file is not what is asked for
        LatentClips.build(tmp_path / "clips.pt", {"key": 2}, unread(), vae, tokenizer, **made)


def test_a_cached_clip_has_the_name_of_its_file_and_is_made_again_where_that_was_replaced(files, tmp_path):
    shutil.copytree(files / "videos", tmp_path / "videos")
    videos = config(files, tmp_path, train_data=DATA | {"video_folder": str(tmp_path / "videos")}).data()
    base, path = load_base(files / "nano.safetensors"), files / "nano.safetensors"

    def source() -> tuple[LatentClips, list[str]]:
        lines = []
        return videos.source(base, path, tmp_path, cache=True, num_workers=1, log=lines.append), lines

    (made, lines), (read, no_lines) = source(), source()
    assert lines and not no_lines and list(made.files) == list(read.files)
    assert sorted(Path(file).name for file in read.files) == ["a.mp4", "b.mp4", "c.mp4"]
    index = next(i for i, file in enumerate(read.files) if file.endswith("b.mp4"))
    assert torch.equal(Tokenizer()(["wall b"])[0, 0].int(), read.tokens[index])
    shutil.copyfile(tmp_path / "videos/a.mp4", tmp_path / "videos/b.mp4")  # as many bytes, perhaps: the time tells
    assert source()[1]


def test_each_process_reads_its_own_micro_batches(files, monkeypatch):
    """Of two processes, the one that begins with micro-batch 1 goes on with 3; and anew wherever it is asked to."""
    clips = Clips(ClipConfig(video_folder=str(files / "videos"), **DATA), seed=5)
    monkeypatch.setattr(latents, "rank_and_world_size", lambda: (1, 2))
    monkeypatch.setattr(latents, "encode", lambda vae, video: video)
    source = StreamedClips(ClipReader(clips, num_workers=1), None, Tokenizer())
    for index in (1, 3, 8):
        video, _ = source.batch(index, 2, torch.Generator().manual_seed(0))
        expected = [clips[2 * index + i] for i in range(2)]
        assert torch.equal(video, torch.stack([clip.pixels for clip in expected]))
        assert source.names == [clip.path for clip in expected]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(files, tmp_path, monkeypatch):
    whole, cut = (config(files, tmp_path / name, version="v3") for name in ("whole", "cut"))
    whole.run(quiet)
    loss = DiffusionStage.loss

    def dies(self, index, *rest):
        if index == 1:
            raise InterruptedError
        return loss(self, index, *rest)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(DiffusionStage, "loss", dies)
        cut.run(quiet)
    cut.run(quiet)
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])


def test_no_reader_outlives_a_training(files, tmp_path, monkeypatch):
    loss = DiffusionStage.loss

    def counted(*arguments):
        loss(*arguments)
        assert multiprocessing.active_children()
        raise InterruptedError

    monkeypatch.setattr(DiffusionStage, "loss", counted)
    with pytest.raises(InterruptedError):
        config(files, tmp_path, threads=1).run(quiet)
    assert not multiprocessing.active_children()


# ---- how it learns


def test_only_the_motion_modules_learn():
    _, gradients = loss_and_gradients(motion_stage())
    assert gradients and all("motion_modules." in name for name in gradients)


def test_checkpointed_activations_give_the_same_gradients():
    plain, checkpointed = motion_stage(), motion_stage()
    checkpoint_activations(checkpointed.unet)
    (loss, expected), (again, found) = map(loss_and_gradients, (plain, checkpointed))
    assert loss == again and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_bfloat16_is_close():
    (loss, expected), (again, found) = (loss_and_gradients(motion_stage(autocast=a)) for a in (None, torch.bfloat16))
    assert loss != again and again == pytest.approx(loss, rel=0.02)
    both = [torch.cat([g[name].flatten() for name in expected]) for g in (expected, found)]
    assert torch.cosine_similarity(*both, dim=0) > 0.98


@pytest.mark.gpu
def test_on_a_gpu(files, tmp_path):
    """The first loss is the CPU's; what is trained is a file as any other, also when it goes on."""
    for device in ("cpu", "cuda"):
        path = config_file(files, tmp_path / device, gradient_checkpointing=device == "cuda")
        train.main(["--config", str(path), "--device", device])
    cpu, cuda = (torch.load(tmp_path / d / "state.pt", weights_only=True, map_location="cpu") for d in ("cpu", "cuda"))
    assert cuda["step"] == 2
    assert all(torch.allclose(cpu["model"][k], cuda["model"][k], atol=5e-3) for k in cpu["model"])
    (tmp_path / "cuda/motion.safetensors").unlink()
    train.main(["--config", str(tmp_path / "cuda/config.yaml"), "--device", "cuda"])
    load_motion_module(load_base(files / "nano.safetensors").unet, tmp_path / "cuda/motion.safetensors")


# ---- mistakes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_data": DATA | {"video_folder": "{}/videos", "sample_n_frames": 25}}, "got 25, expected at most 24"),
        ({"train_data": DATA | {"video_folder": "{}/videos", "sample_size": [16, 20]}}, "a side of 20 pixels"),
        ({"train_data": DATA | {"video_folder": "{}/no"}}, "no, which is no folder"),
        ({"train_data": DATA}, "train_data: got neither csv_path nor video_folder"),
        ({"pretrained_model_path": "none.safetensors"}, "got none.safetensors, which is not there: check the path"),
        (
            {"pretrained_model_path": "outputs/shapes_decoder/none.safetensors"},
            "train it first: scripts/train.py --config configs/train/shapes_decoder.yaml",
        ),
        ({"init_from": "{}/mm_v2.safetensors"}, "v2"),
        ({"version": "v4"}, "version: got 'v4', expected v1 or v2 or v3"),
        ({"num_workers": 1}, "got 'num_workers' beside another spelling of it, expected one of num_workers, threads"),
    ],
)
def test_mistakes(files, tmp_path, values, message):
    text = yaml.safe_dump({"version": "v1"} | values).replace("{}", str(files))
    with pytest.raises(UserError, match=message):
        config(files, tmp_path, **yaml.safe_load(text)).run(quiet)


def test_the_shipped_config():
    shipped = load_train_config(CONFIGS / "motion_module.yaml")
    assert shipped.train_data.size == (256, 256) and shipped.train_data.span == 61


def test_check_data(files, tmp_path, capsys):
    path = config_file(files, tmp_path)
    train.main(["--config", str(path), "--check-data"])
    assert capsys.readouterr().out == "3 of 3 videos can be used\n"
    long = yaml.safe_dump(DATA | {"video_folder": str(files / "videos"), "sample_n_frames": 9}, default_flow_style=True)
    with pytest.raises(UserError, match="3 videos of which none can be used"):
        train.main(["--config", str(path), "--check-data", f"train_data={long}"])
    assert "too short: 3" in capsys.readouterr().out
    with pytest.raises(UserError, match="draws its own clips"):
        train.main(["--config", str(CONFIGS / "shapes_motion.yaml"), "--check-data"])


def test_the_flag_for_caching(files, tmp_path):
    path = config_file(files, tmp_path, version="v2", loop=UNLEARNT)
    train.main(["--config", str(path), "--device", "cpu", "--cache"])
    assert (tmp_path / "clips.pt").is_file()
    with pytest.raises(UserError, match="got --cache for .*shapes_image.yaml, which draws its own clips"):
        train.main(["--config", str(CONFIGS / "shapes_image.yaml"), "--cache"])


@pytest.mark.slow
def test_float16(files, tmp_path):
    """Close to float32, and a training as any other."""
    (loss, expected), (again, found) = (loss_and_gradients(motion_stage(autocast=a)) for a in (None, torch.float16))
    assert loss != again and again == pytest.approx(loss, rel=0.005)
    both = [torch.cat([g[name].flatten() for name in expected]) for g in (expected, found)]
    assert torch.cosine_similarity(*both, dim=0) > 0.999
    config(files, tmp_path, version="v2", dtype="float16").run(quiet)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["scaler"]["scale"] > 1
