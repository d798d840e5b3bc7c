"""A config to a folder: the official frames, files that say what made them, and runs that can be taken up again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import animatediff
from animatediff.checkpoints.files import file_sha256
from animatediff.config.prompt_yaml import config_of, load_config
from animatediff.media.video import read_metadata, read_video
from animatediff.pipeline import run
from animatediff.pipeline.run import animate, file_words, plan
from animatediff.utils import UserError
from tests.nano import entry, flat, write_config

GOLDEN = Path(__file__).parents[1] / "golden/nano/e2e"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))["cases"]


def official_entry(nano: Path, case: dict) -> dict:
    """A golden case as an entry of an official prompt YAML."""
    values = {
        "pretrained_model_path": str(nano / "nano.safetensors"),
        "inference_config": f"configs/inference/inference-{case['version']}.yaml",
        "motion_module": str(nano / f"mm_{case['version']}.safetensors"),
        "dreambooth_path": "",
        "lora_model_path": "",
        **{key: case[key] for key in ("prompt", "seed", "steps", "guidance_scale", "L", "H", "W")},
        "n_prompt": [case["n_prompt"]],
        "format": "png",
    }
    if "motion_lora" in case:
        lora = {"path": str(nano / "motion_lora.safetensors"), "alpha": case["motion_lora"]}
        values["motion_module_lora_configs"] = [lora]
    if "adapter" in case:
        values |= {"adapter_lora_path": str(nano / "adapter.safetensors"), "adapter_lora_scale": case["adapter"]}
    if "kohya" in case:
        values |= {"lora_model_path": str(nano / "kohya.safetensors"), "lora_alpha": case["kohya"]}
    return values


@pytest.mark.parametrize("form", ["gif", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mp4", "webp", "png"))])
def test_a_run_that_is_taken_up_ends_with_the_same_files(nano, tmp_path, form):
    """The grid too; a clip that was emptied is made again."""

    def contents(folder: Path) -> dict[Path, bytes | bool]:
        files = [path for path in sorted(folder.rglob("*")) if path.name != "config.yaml"]
        return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in files}

    values = {"format": form, "L": 2, "prompt": ["a fox", "a cat"]}
    config = load_config(write_config(tmp_path / "two.yaml", entry(nano, **values)))
    folder = animate(config, output_dir=tmp_path / "out", device="cpu")
    before = contents(folder)
    grid = folder / ("sample-grid" if form == "png" else f"sample.{form}")
    shutil.rmtree(grid) if form == "png" else grid.unlink()
    clip = max((folder / "sample").iterdir())
    (clip / "0001.png" if form == "png" else clip).write_bytes(b"")
    (folder / "sample/.tmp-killed").mkdir()  # as a killed run leaves it
    animate(config, output_dir=folder, device="cpu")
    assert contents(folder) == before


@pytest.mark.slow
def test_official_frames(nano, tmp_path):
    """Every golden run, as the entries of one official prompt YAML, one after the other."""
    config = load_config(write_config(tmp_path / "golden.yaml", *(official_entry(nano, c) for c in CASES.values())))
    folder = animate(config, output_dir=tmp_path / "out", device="cpu")
    expected = [
        np.load(GOLDEN / f"{name}-{i}.npz")["frames"] for name, c in CASES.items() for i in range(len(c["prompt"]))
    ]
    jobs = plan(load_config(folder / "config.yaml"), folder)
    for job, frames in zip(jobs, expected, strict=True):
        error = read_video(job.path)[0].numpy().astype(float) - frames
        assert 10 * np.log10(255**2 / max((error**2).mean(), 1e-12)) > 60, job.path.name


@pytest.fixture(scope="module")
def config(nano, tmp_path_factory):
    """Two entries of different sizes, three prompts, seeds to be drawn."""
    first = entry(nano, prompt=['a "red"/fox: 2', "snow"], seed=-1, n_prompt=["bad"], format="webp")
    tall = entry(nano, prompt=["tall"], H=24, L=3, window_schedule="open", window_length=2)
    path = write_config(tmp_path_factory.mktemp("config") / "mine.yaml", first, tall)
    return load_config(path)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a whole run; not to be changed."""
    return animate(config, output_dir=tmp_path_factory.mktemp("run") / "out", device="cpu")


def test_files_of_a_run(nano, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = animate(config, device="cpu")
    assert folder.parent == Path("samples") and folder.name.startswith("mine-20")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = ["0-a-red-fox-2.webp", "1-snow.webp", "2-tall.gif"]
    assert files == ["config.yaml", "sample.webp", *(f"sample/{name}" for name in names)]
    output = capsys.readouterr()
    assert [Path(line).name for line in output.out.splitlines()] == [*names, "sample.webp"]
    assert "prompt 3/3: 100%" in output.err and "sd1-checkpoint" in output.err

    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    seeds = saved["entries"][0]["sampling"]["random_seed"]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**64 for seed in seeds)
    assert saved["entries"][1]["sampling"]["random_seed"] == [42] and "seed" not in saved["entries"][0]["sampling"]
    hashes = {str(nano / name): file_sha256(nano / name) for name in ("nano.safetensors", "mm_v3.safetensors")}
    assert saved["provenance"]["weights"] == hashes
    assert saved["provenance"]["torch"] == str(torch.__version__) and saved["provenance"]["dtype"] == "float32"

    settings = flat(read_metadata(folder / "sample" / names[0]))
    assert settings["prompt"] == 'a "red"/fox: 2' and settings["negative_prompt"] == "bad"
    assert settings["seed"] == seeds[0] and settings["steps"] == 2 and settings["frames"] == 2
    assert (settings["sampler"], settings["timestep_spacing"]) == ("ddim", "leading")
    assert (saved["entries"][0]["sampling"]["sampler"], settings["guidance_scale"]) == ("ddim", 7.5)
    assert settings["motion_module"] == {
        "path": str(nano / "mm_v3.safetensors"),
        "sha256": hashes[str(nano / "mm_v3.safetensors")],
    }
    tall = flat(read_metadata(folder / "sample" / names[2]))
    assert (tall["window_schedule"], tall["window_length"], tall["window_overlap"]) == ("open", 2, 0)
    assert "window_schedule" not in settings and saved["entries"][1]["windows"]["overlap"] == 0
    grid, _ = read_video(folder / "sample.webp")
    assert grid.shape == (3, 24 + 4, 3 * 18 + 2, 3)  # the tallest and the longest decide


@pytest.mark.slow
@pytest.mark.parametrize(("values", "told"), [({}, 1), ({"motion_module": ""}, 0), ({"L": 1}, 0)])
def test_a_clip_of_unrelated_pictures_is_told(nano, tmp_path, capsys, values, told):
    path = str(nano / "nano.safetensors")
    given = {"pretrained_model_path": path, "prompt": "a fox", "L": 2, "H": 16, "W": 16, "steps": 1} | values
    animate(config_of(given, name="sample"), output_dir=tmp_path / "out", device="cpu")
    assert capsys.readouterr().err.count("every frame is a picture of its own") == told


def test_an_interrupted_run_goes_on(config, finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second clip: the first stays as it is, the rest is made, all as a recorded run has it."""
    recorded = load_config(finished / "config.yaml")
    calls, original = [], run.AnimateDiffPipeline.sample

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(run.AnimateDiffPipeline, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        animate(recorded, output_dir=out, device="cpu")
    assert f"1 of 3 prompts are done; to go on, repeat the command with --output-dir {out}" in capsys.readouterr().err
    (first,) = (out / "sample").iterdir()
    stamp = first.stat().st_mtime_ns
    # `config` asks for seeds to be drawn; the folder's are kept.
    assert animate(config, output_dir=out, device="cpu") == out
    assert len(calls) == 4 and first.stat().st_mtime_ns == stamp
    for path in (finished / "sample").iterdir():
        assert path.read_bytes() == (out / "sample" / path.name).read_bytes()
    assert (out / "sample.webp").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    animate(config, output_dir=out, device="cpu")
    assert len(calls) == 4 and {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_who_follows_a_run_is_told_of_steps_and_estimates_and_may_end_it(config, tmp_path):
    """Estimates are latents of the clip, the last of which is the clip's own, and none comes after the end."""
    seen: list[object] = []

    class Stop(Exception):
        pass

    class Watch(run.Follower):
        until = 10**6

        def loaded(self, pipeline):
            seen.append("loaded")

        def estimated(self, latents):
            seen.append(tuple(latents.shape))

        def stepped(self, done, total):
            seen.append((done, total))
            if done >= self.until:
                raise Stop

    small = replace(config.entries[0], size=replace(config.entries[0].size, num_frames=2, height=16, width=16))
    small = replace(small, prompts=replace(small.prompts, prompt=small.prompts.prompt[:1]))
    small = replace(config, entries=(small,))
    animate(small, output_dir=tmp_path / "whole", device="cpu", follower=Watch())
    total = max(e[1] for e in seen if isinstance(e, tuple) and len(e) == 2)
    assert seen == ["loaded", *(x for n in range(total) for x in ((1, 2, 4, 2, 2), (n + 1, total)))]
    seen.clear()
    Watch.until = 1
    with pytest.raises(Stop):
        animate(small, output_dir=tmp_path / "ended", device="cpu", follower=Watch())
    assert seen[-1] == (1, total)
    assert not list((tmp_path / "ended").glob("sample/*"))


def test_too_large_a_clip_is_told_in_one_line(config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(run.AnimateDiffPipeline, "sample", full)
    with pytest.raises(UserError, match="entry 1: got 2 frames of 16x16, more than the device's memory") as error:
        animate(config, output_dir=tmp_path / "out", device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(config, finished, tmp_path):
    out = finished
    first, second = config.entries
    changed = replace(config, entries=(replace(first, sampling=replace(first.sampling, steps=3)), second))
    with pytest.raises(UserError, match="entry 1: steps: got 3, but .*out was made with 2"):
        animate(changed, output_dir=out, device="cpu")
    seeded = replace(config, entries=(replace(first, sampling=replace(first.sampling, seed=(5,))), second))
    with pytest.raises(UserError, match="entry 1: seed: got"):
        animate(seeded, output_dir=out, device="cpu")
    with pytest.raises(UserError, match="got 1 entries, but .*out was made with 2"):
        animate(replace(config, entries=config.entries[:1]), output_dir=out, device="cpu")
    with pytest.raises(UserError, match="got dtype bfloat16, but .*out was made with float32"):
        animate(config, output_dir=out, device="cpu", dtype="bfloat16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="full, which holds no config.yaml"):
        animate(config, output_dir=tmp_path / "full", device="cpu")
    with pytest.raises(UserError, match="cannot make the folder .*letter.txt/out"):
        animate(config, output_dir=tmp_path / "full/letter.txt/out", device="cpu")


def test_a_changed_weight_file_is_noticed(config, finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    next((out / "sample").iterdir()).unlink()
    text = (out / "config.yaml").read_text(encoding="utf-8")
    for sha256 in load_config(out / "config.yaml").provenance["weights"].values():
        text = text.replace(sha256, "0" * 64)
    (out / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="which has changed since"):
        animate(config, output_dir=out, device="cpu")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red fox running", "a-red-fox-running"),
        ("../../etc/passwd; rm -rf *", "etc-passwd-rm-rf"),
        ("one two three four five six seven eight nine ten eleven", "one-two-three-four-five-six-seven-eight-nine-ten"),
        ("w" * 300, "w" * 60),
        (f"{'w' * 50} beige background", f"{'w' * 50}-beige"),  # whole words
        ("ein süßer Fuchs, 雪の中", "ein-süßer-Fuchs-雪の中"),
        ("雪" * 60, "雪" * 20),
        ("", ""),
        ("!?", ""),
    ],
)
def test_file_names(prompt, words):
    assert file_words(prompt) == words


def test_public_surface_is_lazy():
    """`import animatediff` loads no torch; every public name is there."""
    import subprocess
    import sys

    code = "import sys, animatediff; assert 'torch' not in sys.modules; print(*animatediff.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert {"AnimateDiff", "AnimateDiffPipeline", "save_video", "save_videos_grid", "load_config"} <= set(names)
    assert all(getattr(animatediff, name) is not None for name in names) and set(names) <= set(dir(animatediff))
    with pytest.raises(AttributeError, match="nothere"):
        _ = animatediff.nothere
