"""Clips that are made again from their own files, and those of other programs."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.checkpoints.hashes import file_hashes
from animatediff.config.prompt_yaml import load_config
from animatediff.media.video import read_metadata, read_video, save_video
from animatediff.pipeline.finish_clip import finish_clip
from animatediff.pipeline.remembered import SeveralClips, load_run, read_remembered
from animatediff.pipeline.run_folder import clip_settings, recorded_dtype
from animatediff.utils import UserError
from scripts.animate import main
from scripts.doctor import main as doctor
from tests.config.test_comfy_prompt import clip as comfy_clip
from tests.config.test_comfy_prompt import drawn as comfy_workflow
from tests.config.test_infotext import SD15
from tests.media.foreign_files import as_mp4, as_png, with_exif
from tests.nano import entry, write_config

PIXELS = np.zeros((2, 16, 16, 3), np.uint8)


def fill(folder: Path, nano: Path) -> None:
    """models/ and a picture."""
    (folder / "models").mkdir()
    for name in ("nano", "mm_v3", "kohya"):
        shutil.copy(nano / f"{name}.safetensors", folder / "models")
    Image.fromarray(PIXELS[0] + 99).save(folder / "first.png")


@pytest.fixture
def here(nano, tmp_path, monkeypatch) -> Path:
    """A current folder with models of its own."""
    fill(tmp_path, nano)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Path:
    """Animate one prompt."""
    main([str(argument) for argument in arguments])
    newest = max(Path("samples").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    (clip,) = (newest / "sample").iterdir()
    return clip


@pytest.fixture(scope="module")
def original(nano, tmp_path_factory):
    """A current folder with a run of one clip, that has a LoRA and begins with a picture."""
    folder = tmp_path_factory.mktemp("original")
    fill(folder, nano)
    loras = [{"path": "models/kohya.safetensors", "scale": 0.5}]
    values = entry(Path("models"), lora_model_path=loras, image="first.png", seed=-1, prompt=['a "fox": red'])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("--config", write_config(folder / "fox.yaml", values))
    return folder


@pytest.fixture
def made(original, tmp_path, monkeypatch) -> Path:
    """The clip, in a copy of that folder, which is the current one."""
    folder = shutil.copytree(original, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return next(Path("samples").glob("*/sample/*.gif"))


def test_a_clip_is_made_again_from_its_own_file(made, capsys):
    again = run("--config", made)
    assert again.read_bytes() == made.read_bytes()
    assert "is now" not in capsys.readouterr().err


def test_a_clip_and_its_run_are_one_config(made):
    request, notes = load_run(made)
    for path in (made.parents[1], made.parents[1] / "config.yaml"):
        config, more = load_run(path)
        (told,) = config.entries[0].per_prompt()
        assert [told] == request.entries[0].per_prompt() and more == notes == []
        assert config.entries[0].model == request.entries[0].model and config.entries[0].size == request.entries[0].size
        assert config.name == made.parents[1].name.partition("-20")[0]  # not "config"
    assert request.provenance == {"device": "cpu", "dtype": "float32"}
    (changed,) = load_run(made, {"steps": 7})[0].entries
    assert changed.sampling.steps == 7
    assert replace(changed, sampling=request.entries[0].sampling) == request.entries[0]


def test_files_that_were_moved_are_found_by_their_content(made):
    models = Path("models")
    (models / "deep").mkdir()
    (models / "nano.safetensors").rename(models / "deep/base model.safetensors")
    (models / "kohya.safetensors").rename(models / "deep/style.safetensors")
    Path("first.png").rename(made.parent / "first.png")
    config, told = load_run(made)
    (request,) = config.entries
    assert request.model.base == "models/deep/base model.safetensors"
    assert [(lora.path, lora.scale) for lora in request.model.loras] == [("models/deep/style.safetensors", 0.5)]
    assert Path(request.inputs.image) == made.parent / "first.png"
    assert request.model.motion_module == "models/mm_v3.safetensors" and len(told) == 3
    same = "pretrained_model_path: models/nano.safetensors is now models/deep/base model.safetensors (the same SHA-256)"
    assert told[0].removeprefix("model.base: ") == same.removeprefix("pretrained_model_path: ")
    assert load_run(made.parents[1], {"image": "other.png"})[0].entries[0].model == request.model


def test_files_that_have_changed_are_named_unless_others_are(made, nano):
    shutil.copy(nano / "adapter.safetensors", "models/kohya.safetensors")
    Path("models/mm_v3.safetensors").unlink()
    hashes = {file["path"]: file["sha256"] for file in read_metadata(made)["files"].values()}
    got = file_hashes(Path("models/kohya.safetensors")).sha256[:10]
    with pytest.raises(UserError) as error:
        main(["--config", str(made)])
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "motion_module: there is no models/mm_v3.safetensors" in lines[0]
    assert f"expected hash {hashes['models/mm_v3.safetensors'][:10]}, which no file under models/ has" in lines[0]
    expected = f"got models/kohya.safetensors with hash {got}, expected hash {hashes['models/kohya.safetensors'][:10]}"
    assert expected in lines[1] and "or name one by lora_model_path=…" in lines[1]
    config, _ = load_run(made, {"lora_model_path": "models/kohya.safetensors", "motion_module": ""})
    assert config.entries[0].model.loras[0].path == "models/kohya.safetensors"


@pytest.mark.slow
def test_a_second_pass_finds_what_was_moved(made, capsys):
    Path("models/nano.safetensors").rename("models/moved.safetensors")
    target, _ = finish_clip(made, {"finish.scale": 1.5, "finish.strength": 0.5, "finish.steps": 2}, device="cpu")
    assert read_video(target)[0].shape[1:3] == (24, 24)
    assert "models/nano.safetensors is now models/moved.safetensors" in capsys.readouterr().err


def test_doctor_shows_what_made_a_clip(made, capsys):
    Path("models/nano.safetensors").rename("models/base.safetensors")
    Path("models/kohya.safetensors").unlink()
    assert doctor(["samples", str(made)]) == 2  # a folder of runs is neither a model nor a clip
    out, err = capsys.readouterr()
    assert "samples" in err and err.count("\n") == 1
    rows = [line.strip() for line in out.splitlines()]
    assert rows[0] == str(made) and rows[1].endswith("on cpu, float32")
    assert 'prompt      a "fox": red' in rows and "scale: 0.5" in rows
    at = rows.index("file        model.base = models/nano.safetensors")
    assert rows[at + 2] == "now       moved to models/base.safetensors"
    at = rows.index("file        model.loras[0].path = models/kohya.safetensors")
    assert rows[at + 2].startswith("now       there is no models/kohya.safetensors")
    assert rows[rows.index("file        inputs.image = first.png") + 2] == "now       there, unchanged"


def test_doctor_says_which_clips_a_run_has(made, capsys):
    assert doctor([str(made.parents[1])]) == 2
    err = capsys.readouterr().err
    assert f"a folder without PNG frames, expected a clip, such as {made.parent}" in err and err.count("\n") == 1


def test_doctor_shows_what_others_made(here, capsys):
    hostile = SD15.replace("a cat", "a \x1b[31mcat")
    assert doctor([str(as_png(here / "their.png", parameters=hostile))]) == 0
    out = capsys.readouterr().out
    assert "made by     AUTOMATIC1111" in out and "needs       model.base: dreamshaper_8 (hash 879db523c3)" in out
    assert "unread      ADetailer model face, yolo: n" in out and "\x1b" not in out


@pytest.mark.slow
def test_the_dtype_of_a_run_is_that_of_the_next(here):
    half = run("--config", write_config(here / "fox.yaml", entry(Path("models"))), "--dtype", "bfloat16")
    assert (read_metadata(half)["device"], read_metadata(half)["dtype"]) == ("cpu", "bfloat16")
    assert run("--config", half).read_bytes() == half.read_bytes()


def test_only_on_the_same_kind_of_device():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    recorded = {"device": "cuda:1", "dtype": "bfloat16"}
    assert (recorded_dtype(recorded, cuda), recorded_dtype(recorded, cpu)) == ("bfloat16", None)
    assert recorded_dtype({}, cpu) is None


ROUND = [
    {"prompt": ["a fox, ${x} <b>: 'é' 狐\nline"], "n_prompt": ["bad"], "seed": 2**64 - 1},
    {
        "prompt": [{0: "a fox", 1: "a wolf: 2"}],
        "prompt_weighting": True,
        "window_schedule": "closed",
        "window_length": 2,
    },
    {"guidance_schedule": {"0%": 1, "50%": 0.5}, "motion_scale": [1.0, 0.5], "freeu": True, "freeinit": {"fast": True}},
    {"motion_module_lora_configs": [{"path": "a.ckpt", "alpha": 0.3}], "finish": {"interpolate": 2, "loop": False}},
]


@pytest.mark.parametrize("form", ["gif", "mp4", "webp", ""])
@pytest.mark.parametrize("values", ROUND)
def test_settings_to_a_clip_and_back(tmp_path, form, values):
    request = load_config(write_config(tmp_path / "x.yaml", entry(Path("m"), **values))).entries[0]
    hashes = {"model.base": "0" * 64, "model.motion_module": "1" * 64, "model.motion_loras[0].path": "2" * 64}
    path = save_video(PIXELS, tmp_path / (f"clip.{form}" if form else "clip"), 8, clip_settings(request, hashes))
    known = read_remembered(path)
    assert known.request() == request and known.foreign is None
    assert known.hashes["m/nano.safetensors"] == "0" * 64


def test_a_grid_is_no_clip_and_a_picture_has_no_settings(tmp_path):
    grid = save_video(PIXELS, tmp_path / "grid.gif", 8, {"prompts": ["a", "b"]})
    with pytest.raises(SeveralClips, match="shows several clips side by side"):
        load_run(grid)
    with pytest.raises(UserError, match="which holds no settings, expected a clip made by us, by AUTOMATIC1111 or"):
        load_run(save_video(PIXELS, tmp_path / "plain.mp4", 8))


# ---- other programs -------------------------------------------------------------------------------------------


def infotext(here: Path) -> str:
    """As AUTOMATIC1111 would write it of files that lie in models/ under other names."""
    base, lora = (file_hashes(here / f"models/{name}.safetensors") for name in ("nano", "kohya"))
    return (
        "a fox (red:1.2), <lora:my style:0.7>\nin snow\nNegative prompt: bad\nSteps: 2, Sampler: Euler a, CFG scale: "
        f"3, Seed: 5, Size: 16x24, Model hash: {base.sha256[:10]}, Model: dreamshaper, "
        f'Lora hashes: "my style: {lora.weights[:12]}", Face restoration: GFPGAN'
    )


@pytest.mark.slow
def test_a_picture_of_automatic1111_becomes_a_clip(here, capsys):
    """Files by their short hashes; what has no counterpart in one line; options changed."""
    picture = as_png(here / "their.png", parameters=infotext(here))
    clip = run("--config", picture, "motion_module=models/mm_v3.safetensors", "L=2")
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if "AUTOMATIC1111" in line)
    assert line == (
        f"{picture}: settings of AUTOMATIC1111, whose noise is another: not the same pictures; no counterpart here: "
        "Face restoration GFPGAN"
    )
    settings = read_metadata(clip)
    assert settings["prompt"] == "a fox (red:1.2), \nin snow" and settings["negative_prompt"] == "bad"
    assert settings["model"] == {
        "base": "models/nano.safetensors",
        "motion_module": "models/mm_v3.safetensors",
        "loras": [{"path": "models/kohya.safetensors", "scale": 0.7}],
    }
    assert settings["size"] == {"num_frames": 2, "height": 24, "width": 16}
    assert settings["sampling"]["sampler"] == "euler_ancestral" and settings["seed"] == 5


def test_wherever_automatic1111_writes(here):
    text = infotext(here).replace("fox", "狐 fox")
    wide = [b"UNICODE\0" + text.encode(f"utf-16-{order}") for order in ("be", "le")]
    files = [
        as_png(here / "a.png", parameters=text),
        *(with_exif(here / f"{i}.jpg", comment) for i, comment in enumerate(wide)),
        with_exif(here / "a.webp", wide[0]),
        as_mp4(here / "a.mp4", comment=text),
    ]
    Image.fromarray(PIXELS[0]).save(here / "a.gif", comment=text.encode())
    (here / "a.txt").write_text(text, encoding="utf-8")
    for path in (*files, here / "a.gif", here / "a.txt"):
        request = load_run(path)[0].entries[0]
        assert request.prompts.prompt == ("a 狐 fox (red:1.2), \nin snow",), path
        assert request.model.base == "models/nano.safetensors" and request.size.num_frames == 1
        assert request.output.format == (path.suffix[1:] if path.suffix in (".mp4", ".webp") else "gif")


def test_wherever_comfyui_writes(here):
    for old, new in (("nano", "dreamshaper_8"), ("mm_v3", "v3_sd15_mm"), ("kohya", "my style")):
        (here / f"models/{old}.safetensors").rename(here / f"models/{new}.safetensors")
    (here / "models/SD1.5").mkdir()
    (here / "models/dreamshaper_8.safetensors").rename(here / "models/SD1.5/dreamshaper_8.safetensors")
    graph = comfy_clip()
    graph["14"]["inputs"]["model_name"] = "v3_sd15_mm.safetensors"
    del graph["14"]["inputs"]["motion_lora"], graph["13"]
    graph["7"]["inputs"]["text"] = "bad"
    text, workflow = json.dumps(graph), json.dumps({"last_node_id": 3, "nodes": []})
    both, drawn = json.dumps({"prompt": text, "workflow": workflow}), json.dumps(comfy_workflow(graph))
    files = [
        as_png(here / "a.png", prompt=text, workflow=workflow),
        as_png(here / "b.png", prompt=text, parameters=SD15),  # the graph says more
        with_exif(here / "a.webp", make=f"workflow:{workflow}", model=f"prompt:{text}"),
        as_mp4(here / "a.mp4", {"movflags": "use_metadata_tags"}, prompt=text, workflow=workflow),
        as_mp4(here / "b.mp4", comment=both),
        as_png(here / "d.png", workflow=drawn),
    ]
    (here / "a.json").write_text(text)
    (here / "b.json").write_text(drawn)
    for path in (*files, here / "a.json", here / "b.json"):
        (request,) = load_run(path)[0].entries
        assert request.prompts.prompt == ({0: 'best, a fox "sleeps"', 16: "best, a fox wakes"},), path
        assert request.model.base == "models/SD1.5/dreamshaper_8.safetensors"
        assert request.model.motion_module == "models/v3_sd15_mm.safetensors"
        assert [(lora.path, lora.scale) for lora in request.model.loras] == [("models/my style.safetensors", 0.7)]
    with pytest.raises(UserError, match="with a ComfyUI workflow of which the sampler is not known"):
        load_run(as_png(here / "c.png", workflow=workflow))


def test_a_clip_of_comfyui_is_finished_like_any_other(here):
    """Its `prompt` is no prompt of ours."""
    comment = json.dumps({"prompt": json.dumps(comfy_clip()), "workflow": "{}"})
    target, _ = finish_clip(as_mp4(here / "a.mp4", comment=comment), {"finish.scale": 2})
    assert read_video(target)[0].shape[1:3] == (32, 32)


def test_files_that_are_not_there_are_named_with_their_option(here):
    path = as_png(here / "their.png", parameters=SD15)
    shutil.copy(here / "models/nano.safetensors", here / "models/dreamshaper_8.safetensors")
    with pytest.raises(UserError) as error:
        load_run(path)
    lines = str(error.value).splitlines()
    got = file_hashes(here / "models/nano.safetensors").sha256[:10]
    assert lines[0].endswith(
        "needs my style v1 (hash aabbccddeeff), which is not under models/: put it there, or name a file by "
        'lora_model_path=…, or lora_model_path="" for none'
    )
    expected = f"needs dreamshaper_8 (hash 879db523c3), got models/dreamshaper_8.safetensors with hash {got}: put the "
    assert expected in lines[1] and lines[1].endswith("or name a file by pretrained_model_path=…")
    assert len(lines) == 4 and all(line.startswith(f"{path}: needs ") for line in lines)
    named = {"pretrained_model_path": "x", "lora_model_path": "", "vae_path": "", "model.embeddings": ""}
    (request,) = load_run(path, named)[0].entries
    assert request.model.base == "x" and request.model.loras == request.model.embeddings == ()


def test_hostile_texts_are_data(here, tmp_path_factory):
    """Names that lead elsewhere, or that are not names, find nothing and open nothing."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    secret.write_bytes(b"x")
    for name in (
        f"../{secret.parent.name}/secret",
        str(secret),
        "models/../../secret",
        "a\0b",
        "x" * 5000,
        "~/x",
        "$(id)",
    ):
        text = f"a fox\nSteps: 2, Seed: 1, Model: {name}, Size: 16x16"
        with pytest.raises(UserError) as error:
            load_run(as_png(here / "their.png", parameters=text))
        assert "needs " in str(error.value) and len(str(error.value)) < 1300


@pytest.mark.parametrize("path", ["/dev/zero", "/", "pipe", "."])
def test_what_a_stranger_s_clip_names_is_not_read_for_ever(here, path):
    os.mkfifo(here / "pipe")
    named = {option: {"path": path, "sha256": "0" * 64} for option in ("model.base", "inputs.image")}
    settings = {"prompts": {"prompt": ["x"]}, "model": {"base": path}, "inputs": {"image": path}, "files": named}
    clip = save_video(PIXELS, here / "theirs.gif", 8, settings)
    with pytest.raises(UserError) as error:
        main(["--config", str(clip), "--device", "cpu"])
    assert "\n" not in str(error.value) and path in str(error.value)
