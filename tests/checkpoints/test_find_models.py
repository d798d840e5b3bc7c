"""Weight files found by name and by hash."""

import os
import shutil

import pytest
import torch

from animatediff.checkpoints.files import file_sha256, write_state_dict
from animatediff.checkpoints.find_models import as_option, find_lora, model_files, named, with_digits, with_sha256
from animatediff.checkpoints.hashes import file_hashes
from animatediff.checkpoints.known_files import REPOSITORY
from animatediff.utils import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    return tmp_path


def weights(path, number: float = 1.0, **metadata: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_state_dict(path, {"x": torch.full((4,), number)}, metadata=metadata)


def test_names_may_have_folders_endings_and_capitals(here):
    file = weights(here / "models/SD1.5/DreamShaper_8.safetensors")
    files = model_files()
    for name in (
        "dreamshaper_8",
        "DreamShaper_8.safetensors",
        "SD1.5\\DreamShaper_8.safetensors",
        "sd1.5/dreamshaper_8",
    ):
        assert [path.resolve() for path in named(name, files)] == [file], name
    for name in ("dream", "shaper_8", "SD2/dreamshaper_8", "dreamshaper_8.ckpt", "../SD1.5/dreamshaper_8", "", "/"):
        assert named(name, files) == [], name


def test_links_are_followed_and_circles_end(here, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    weights(elsewhere / "far.safetensors")
    os.symlink(elsewhere, here / "models/disk")
    os.symlink(here / "models", elsewhere / "back")
    os.symlink(here / "nowhere.safetensors", here / "models/broken.safetensors")
    os.mkfifo(here / "models/pipe.safetensors")
    inside = [path for path in model_files() if not path.is_absolute()]
    assert inside == [here.relative_to(here) / "models/disk/far.safetensors"]


def test_a_lora_by_its_file_or_by_what_its_trainer_called_it(here):
    file = weights(here / "models/Lora/v2-final.safetensors", ss_output_name="my style: blue")
    assert find_lora("v2-final").resolve() == find_lora("my style: blue").resolve() == file
    assert find_lora("shapes_neon_lora") == REPOSITORY / "animatediff/assets/shapes_neon_lora.safetensors"
    assert as_option(find_lora("shapes_neon_lora")) == "animatediff/assets/shapes_neon_lora.safetensors"
    with pytest.raises(UserError, match="there is no LoRA 'v2-finel' under .*: the nearest are v2-final") as error:
        find_lora("v2-finel")
    assert "\n" not in str(error.value)
    shutil.rmtree(here / "models")
    with pytest.raises(UserError, match="there is no LoRA .*models: put its file there") as error:
        find_lora("x" * 5000)
    assert "assets" not in str(error.value)


def test_of_two_different_loras_the_folder_has_to_be_said(here):
    weights(here / "models/a/style.safetensors", 1)
    weights(here / "models/b/style.safetensors", 2)
    with pytest.raises(
        UserError, match=r"which may be models/a/style.safetensors, models/b/style.safetensors: name its"
    ):
        find_lora("style")
    assert find_lora("b/style").parent.name == "b"
    weights(here / "models/b/style.safetensors", 1)  # the same file twice is one
    assert find_lora("style").parent.name == "a"


def test_by_the_digits_that_other_programs_show(here):
    """The one of that name is looked at first, then the small ones; larger ones not at all where that is known."""
    right = weights(here / "models/renamed.safetensors", 3)
    weights(here / "models/style.safetensors", 4)
    hashes = file_hashes(right)
    for digits in (hashes.sha256[:10], hashes.weights[:12]):
        assert with_digits(digits, "style", model_files()).resolve() == right
    noted = weights(here / "models/rewritten.safetensors", 5, sshs_model_hash="ABCDEF0123456789")
    assert with_digits("abcdef012345", "style", model_files()).resolve() == noted
    assert with_digits(hashes.sha256[:10], "style", model_files(), largest=1) is None
    assert with_digits("0123456789", "style", model_files()) is None


def test_what_was_moved_is_found_by_its_content(here, tmp_path):
    file = weights(here / "models/deep/new name.safetensors", 5)
    sha256 = file_sha256(file)
    assert with_sha256(sha256, here / "old.safetensors", None).resolve() == file
    assert with_sha256(sha256, here / "old.ckpt", None) is None  # it never changes its format
    beside = weights(here / "clips/near.safetensors", 6)
    assert with_sha256(file_sha256(beside), here / "old.safetensors", here / "clips") == beside


def test_a_moved_folder_is_found_by_its_weights(here):
    weights(here / "models/sd15/unet/diffusion_pytorch_model.safetensors", 7)
    (here / "models/sd15/model_index.json").write_text("{}")
    sha256 = file_sha256(here / "models/sd15")
    assert with_sha256(sha256, here / "stable-diffusion-v1-5", None).resolve() == here / "models/sd15"
