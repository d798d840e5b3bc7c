"""scripts/animate.py as a user runs it: its files, its exit codes, its one-line errors."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from animatediff.media.video import read_metadata, read_video
from animatediff.pipeline import pipeline
from animatediff.utils import UserError, only_writer
from scripts.animate import collect_overrides, main, parse
from tests.nano import entry, flat, write_config, write_files

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/animate.py"


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def config(nano, tmp_path) -> Path:
    return write_config(tmp_path / "fox.yaml", entry(nano))


def start(folder: Path, *arguments: str, command: tuple[str, ...] = (str(SCRIPT),), **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def call(folder: Path, *arguments: str, **options) -> tuple[int, str, str]:
    process = start(folder, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_a_run(config, tmp_path):
    """Options and key=value go before the config; the folder is named after it; paths come on stdout."""
    code, out, err = call(
        tmp_path, "--config", config, "--prompt", "a fox: red", "--seed", "18368660165286593270", "guidance_scale=3",
        "--H", "24", "--format", "webp", "--without-xformers",
    )  # fmt: skip
    assert code == 0, err
    (folder,) = (tmp_path / "samples").iterdir()
    assert folder.name.startswith("fox-")
    clip = folder / "sample/0-a-fox-red.webp"
    assert out.split() == [str(clip.relative_to(tmp_path))], "one clip needs no grid"
    settings = flat(read_metadata(clip))
    assert settings["prompt"] == "a fox: red" and settings["seed"] == 18368660165286593270
    assert settings["guidance_scale"] == 3.0
    assert read_video(clip)[0].shape == (2, 24, 16, 3)
    assert "xformers is never used" in err and "100%" in err and "Traceback" not in err


def test_compile_is_for_every_entry_s_network(nano, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "compile_unet", lambda unet, tell, **rest: tell("told") or compiled.append(unet))
    config = write_config(
        tmp_path / "two.yaml", entry(nano), entry(nano, motion_module=str(nano / "mm_v2.safetensors"))
    )
    main(["--config", str(config), "--output-dir", "plain"])
    assert not compiled and "told" not in capsys.readouterr().err
    main(["--config", str(config), "--output-dir", "compiled", "--compile"])
    assert [unet.config.motion.version for unet in compiled] == ["v3", "v2"]
    assert capsys.readouterr().err.count("told") == 2


def test_one_run_in_a_folder_at_a_time(config, tmp_path):
    """The second would clear away what the first is writing."""
    folder = tmp_path / "run"
    folder.mkdir()
    with only_writer(folder, option="--output-dir", work="run"):
        code, out, err = call(tmp_path, "--config", config, "--output-dir", folder)
        assert code == 2 and out == "" and err.count("\n") == 1 and "in which another run is at work" in err
    assert call(tmp_path, "--config", config, "--output-dir", folder)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "sample"]


def test_ctrl_c_and_again(nano, tmp_path, monkeypatch, capsys):
    """SIGINT after the first clip: exit 130, that clip is whole; the same command finishes the rest."""
    config = write_config(tmp_path / "many.yaml", entry(nano, prompt=["one", "two"], seed=-1, steps=15))
    arguments = ("--config", config, "--output-dir", "out")
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore Ctrl-C
    process = start(tmp_path, *arguments, start_new_session=True, preexec_fn=heard)
    first = tmp_path / "out/sample/0-one.gif"
    deadline = time.monotonic() + 300
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "1 of 2 prompts are done; to go on, repeat the command with --output-dir out" in err
    content = first.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["0-one.gif", "config.yaml"]

    monkeypatch.chdir(tmp_path)
    main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "1 of 2 prompts are there already" in err
    assert [Path(line).name for line in out.split()] == ["1-two.gif", "sample.gif"]
    assert first.read_bytes() == content


def test_as_a_module_with_the_official_options(tmp_path):
    """`python -m scripts.animate` from the repository, as the official README has it; here up to a missing config."""
    code, _, err = call(
        ROOT, "--config", tmp_path / "none.yaml", "--pretrained-model-path", "models/StableDiffusion",
        "--inference-config", "configs/inference/inference-v3.yaml", "--L", "16", "--W", "512", "--H", "512",
        "--without-xformers", command=("-m", "scripts.animate"),
    )  # fmt: skip
    assert code == 2 and err.startswith("error: ") and "none.yaml, which is no file" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'error: got nothing to animate, expected --prompt "…" or --config FILE'),
        (["prompt_map={0: a, 99: b}"], "prompt_map: got a keyframe at 99, expected 0 to 15"),
        (["--prompt", "x", "--sed", "3"], "error: unrecognized arguments: --sed"),
        (["--prompt", "x", "--L", "ten"], "error: override: L: got 'ten', expected a whole number"),
        (["--prompt", "x", "stepz=3"], "error: override: unknown key 'stepz', the nearest known one is 'steps'"),
        (["--prompt", "x", "--seed", "1", "seed=2"], "error: got seed both as an option and as key=value"),
        (["--config", "nope.yaml"], "error: got config nope.yaml, which is no file"),
        (["--config", str(ROOT / "configs/train/shapes_image.yaml")], "a training config is for scripts/train.py"),
        (["--config", str(ROOT / "configs/eval/ablation.yaml")], "a grid is for scripts/ablate.py"),
        (["--config", "."], "error: got ., a folder without config.yaml or PNG frames"),
        (["--config", "fox.yaml", "n_prompt=[a, b]"], "n_prompt: got 2 values for 1 prompt"),
        (["--config", "fox.yaml", "prompt=[]"], "prompt: got an empty list"),
        (["--config", "fox.yaml", "--H", "500"], "H: got 500, expected a multiple of 8"),
        (["--config", "fox.yaml", "steps=0"], "steps: got 0, expected at least 1"),
        (["--config", "fox.yaml", "guidance_scale=-3"], "guidance_scale: got -3"),
        (["--config", "fox.yaml", "motion_module=models/Motion_Module/v3_sd15_mm.ckpt"], "https://huggingface.co/guoyww"),
        (["--config", "fox.yaml", "--output-dir", "x" * 300], "File name too long"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(config, tmp_path, monkeypatch, mistake, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(main, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.yaml"]  # nothing was begun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["controlnet_path=x.ckpt"], "got controlnet_path without controlnet_images, expected images"),
        (["controlnet_path=x.ckpt", "controlnet_images=a.png"], "controlnet_path: there is no x.ckpt"),
        (["L=64"], "L: got 64 frames, expected at most 32"),
        (["--dtype", "int8"], "got dtype 'int8', expected one of float32"),
        (["--device", "npu"], "got device 'npu', expected auto, cuda, mps or cpu"),
        (["--pretrained-model-path", "nowhere"], "give another image model of its family by --pretrained-model-path"),
        (["--inference-config", "configs/inference/inference-v1.yaml"], "describes a v1 module"),
    ],
)
def test_mistakes_that_are_found_with_torch_at_hand(config, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        main(["--config", str(config), *arguments])
    assert "\n" not in str(error.value) and not (tmp_path / "samples").exists()


def test_another_base_takes_nothing_from_the_bundled_config(nano, tmp_path, monkeypatch, capsys):
    """Its size, guidance and motion module belong to the bundled model."""
    monkeypatch.chdir(tmp_path)
    base = entry(nano)["pretrained_model_path"]
    main(
        [
            "--prompt",
            "a fox",
            "--pretrained-model-path",
            str(base),
            "H=16",
            "W=16",
            "L=1",
            "steps=1",
            "--format",
            "webp",
        ]
    )
    clip = tmp_path / capsys.readouterr().out.split()[0]
    settings = flat(read_metadata(clip))
    assert settings["guidance_scale"] == 7.5 and "motion_module" not in settings


def test_options_become_overrides():
    line = ["--prompt", "a", "--prompt", "b", "steps=3", "--n-prompt", "c", "--fps", "12", "eta=0.5"]
    assert collect_overrides(parse(line)) == {
        "prompt": ["a", "b"],
        "n_prompt": ["c"],
        "fps": 12.0,
        "steps": 3,
        "eta": 0.5,
    }
