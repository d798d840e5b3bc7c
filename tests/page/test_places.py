"""Which files are offered, which paths may be asked for, which uploads are kept."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from animatediff.checkpoints.load import load_base
from animatediff.config.prompt_yaml import BUNDLED, load_config
from animatediff.config.spellings import build_request
from animatediff.media.pictures import read_picture, write_picture
from animatediff.media.video import read_video, save_video
from animatediff.models.tiny_decoder import TinyDecoder
from animatediff.page import maker
from animatediff.page.fields import form_fields
from animatediff.page.jobs import Job
from animatediff.page.maker import JobFollower, Maker
from animatediff.page.places import ASSETS, EXAMPLES, Places
from animatediff.page.preview import SIDE, LatentPreview, animated, is_small, thumbnail
from animatediff.pipeline.run_folder import write_config
from animatediff.utils import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model folder with a file in the wrong place, one that is none, and a folder that is one model."""
    folder = tmp_path_factory.mktemp("page") / "models"
    for name in ("StableDiffusion/sd15/unet", "Motion_Module"):
        (folder / name).mkdir(parents=True)
    (folder / "Motion_Module/lora.safetensors").write_bytes((ASSETS / "shapes_neon_lora.safetensors").read_bytes())
    (folder / "Motion_Module/page.ckpt").write_text("<html>404</html>")
    (folder / "StableDiffusion/notes.txt").write_text("hello")
    (folder / "StableDiffusion/.hidden.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def places(models):
    return Places(models, models.parent / "samples")


def test_files_are_offered_with_what_they_are(places, models):
    def offered(name):
        return {Path(path).name: label for label, path in places.offers(form_fields()[name])}

    motion = offered("model.motion_module")
    assert list(motion)[:2] == ["", "shapes_motion.safetensors"]
    assert motion["shapes_motion.safetensors"].endswith("motion module v2, widths 48, 64, 80, float16")
    assert motion["lora.safetensors"] == "✕ lora.safetensors · LoRA of an image model, float16"
    assert motion["page.ckpt"] == "✕ page.ckpt · cannot be read"
    assert "lora.safetensors" in offered("model.loras[0].path")
    assert "sd15" in offered("model.base") and "notes.txt" not in offered("model.base")
    save_file({"x": torch.zeros(1)}, models / "Motion_Module/new.safetensors")
    places.scan()
    assert "new.safetensors" in offered("model.motion_module")


@pytest.mark.parametrize(
    "option, path",
    [
        ("model.base", "/etc/passwd"),
        ("inputs.video", "{output}/../secret.gif"),
        ("inputs.image", "configs/../README.md"),
        ("model.inference_config", "setup.py"),
        ("motion.mask", "/proc/self/environ"),
        ("model.loras", "{models}/../x.safetensors"),
        ("controlnets.nets", "~/x.pth"),
        ("finish.interpolator", "{output}/inputs/clip-and-program.gif"),
        ("model.loras", "{output}/inputs/clip-and-weights.gif"),
    ],
)
def test_no_path_outside_the_folders(places, option, path):
    path = path.format(output=places.output, models=places.models)
    value = {"path": path, "images": "configs/animate/inputs/first.png"} if option == "controlnets.nets" else path
    base = "animatediff/assets/shapes.safetensors"
    request = build_request({"prompt": "a", "model.base": base, option: value}, where="", check=False)
    with pytest.raises(UserError, match="expected a file in .*models( or .*samples)?: put it there"):
        places.check(request)


def test_paths_inside_the_folders(places):
    places.check(load_config(BUNDLED).entries[0])
    values = {"prompt": "a", "model.base": str(places.models / "x"), "video": str(places.output / "y")}
    places.check(build_request(values, where=""))


def test_what_is_gone_is_passed_over(tmp_path):
    """Links to a disk that is not there; a folder among the clips that is none."""
    places = Places(tmp_path / "models", tmp_path / "samples")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/lost.safetensors").symlink_to(tmp_path / "nowhere")
    places.scan()
    made = tmp_path / "samples/page-1/sample"
    clip = save_video(np.zeros((2, 8, 8, 3), np.uint8), made / "0-a.gif")
    frames = save_video(np.zeros((2, 8, 8, 3), np.uint8), made / "1-b")
    (made / "lost.gif").symlink_to(tmp_path / "nowhere")
    (made / "notes").mkdir()
    assert set(places.clips(10)) == {clip, frames}


@pytest.mark.parametrize("refused", ["dtype", "another run is at work"])
def test_a_job_that_may_not_go_on_in_its_folder_gets_another(tmp_path, monkeypatch, refused):
    """The page ran on another device before, say; what is in the first folder stays there."""
    begun = tmp_path / "page-1"
    begun.mkdir()
    (begun / "config.yaml").write_text("- prompt: a")

    def animate(config, *, output_dir, **rest):
        if output_dir == begun:
            raise UserError(f"got {refused}")
        write_config(output_dir, config)

    monkeypatch.setattr(maker, "animate", animate)
    job = Job("me", "a", {"prompt": "a fox", "seed": 3, "output.name": "mine"}, note=str(begun))
    made = Maker(tmp_path, SimpleNamespace(write=lambda job: None), None, tmp_path)(job)
    assert Path(job.note).parent == tmp_path and Path(job.note) != begun
    assert Path(made) == Path(job.note) / "sample/0-a-fox.gif"
    assert (begun / "config.yaml").read_text() == "- prompt: a"


def test_uploads_are_kept_by_their_content(places, tmp_path):
    clip = tmp_path / "clip.gif"
    save_video(np.zeros((2, 8, 8, 3), np.uint8), clip)
    kept = places.keep(clip)
    assert places.keep(clip) == kept and places.find_media(kept)
    assert Path(kept).read_bytes() == clip.read_bytes()
    assert [path.suffix for path in places.uploads.iterdir()] == [".gif"]
    Path(kept).unlink()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_hostile_uploads_are_named_and_never_run(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "bomb.png": pickle.dumps(Bomb()),
        "drawing.png": b"%!PS\n(x) print",
        "page.gif": b"<html><script>alert(1)</script>",
        "cut.mp4": b"\0\0\0\x18ftypmp42",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"got {name}, ") as error:
            places.keep(tmp_path / name)
        assert str(tmp_path) not in str(error.value)
    (tmp_path / "weights.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="expected a picture or clip"):
        places.keep(tmp_path / "weights.ckpt")
    assert not (tmp_path / "bomb").exists()
    assert list(places.uploads.iterdir()) == []


def test_small_pictures_of_large_files(tmp_path):
    write_picture(np.zeros((700, 350, 3), np.uint8), tmp_path / "tall.png")
    (tmp_path / "small.webp").write_bytes(thumbnail(tmp_path / "tall.png"))
    assert read_picture(tmp_path / "small.webp").shape == (SIDE, SIDE // 2, 3)


def test_the_linear_map_is_near_what_the_decoder_shows():
    """Of frames it was not fitted on it misses less than a tenth of the variance, averaged over latent pixels."""
    vae = load_base(ASSETS / "shapes.safetensors").vae
    video = read_video(EXAMPLES / "animate/inputs/right.gif", most=8)[0].movedim(-1, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode_video(video)
        decoded = functional.avg_pool2d(vae.decode_video(latents)[0], vae.config.downsampling).movedim(1, -1)
    shown = torch.from_numpy(LatentPreview(vae, small=False).frames(latents)) / 127.5 - 1
    assert shown.shape == decoded.shape
    assert (shown - decoded).square().mean() < 0.1 * decoded.var()


def test_a_tiny_decoder_is_found_by_name(tmp_path, capsys, monkeypatch):
    """One that does not fit is named, and the clip is made."""
    monkeypatch.setattr("animatediff.page.preview.SMALL", 0)
    base, file = load_base(ASSETS / "shapes.safetensors"), tmp_path / "taesd_decoder.pth"
    pipeline = SimpleNamespace(unet=base.unet, vae=base.vae, device="cpu")
    for content, found in ((TinyDecoder(), True), (torch.nn.Linear(1, 1), False)):
        torch.save({f"decoder.{key}": t for key, t in content.state_dict().items()}, file)
        follower = JobFollower(Job("me", "a", {}), 8, tmp_path)
        follower.loaded(pipeline)
        assert (follower.preview.tiny is not None) is found
        assert ("taesd_decoder.pth, expected a complete TAESD decoder" in capsys.readouterr().err) is not found


def test_a_preview_is_small():
    vae = load_base(ASSETS / "shapes.safetensors").vae
    latents = torch.zeros(1, 70, vae.config.latent_channels, 4, 6)
    assert is_small(vae), "it is its own preview"
    assert LatentPreview(vae, small=True).frames(latents).shape[:1] == (24,)
    wide = torch.zeros(1, 2, 4, 32, 64)
    tiny = LatentPreview(vae, small=False, tiny=TinyDecoder()).frames(wide)
    assert tiny.shape == (2, SIDE // 2, SIDE, 3), "a decoder that was found makes 512 pixels, which are shrunk"
    frames = LatentPreview(vae, small=False).frames(latents)
    assert frames.shape == (24, 4, 6, 3)
    assert len(animated(frames, 8)) < 5000
