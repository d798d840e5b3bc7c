"""Reading what people really have on disk, and saying what is wrong with it."""

import collections
import hashlib
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from animatediff.checkpoints import pickles
from animatediff.checkpoints.files import file_sha256, find_weights, read_state_dict, write_state_dict
from animatediff.utils import UserError
from tests.checkpoints.synthetic import equal
from tests.disk import nearly_full

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16), "c": torch.tensor(3)}


class RunsCode:
    """A pickle of this creates a folder when it is loaded by an ordinary unpickler."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    path = write_state_dict(tmp_path / f"x{suffix}", TENSORS, metadata={"version": "v1"})
    file = read_state_dict(path)
    assert equal(file.tensors, TENSORS)
    assert file.metadata["version"] == "v1"
    assert sorted(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_strided_and_shared_tensors_are_written(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": whole.T, "twice": whole, "again": whole}
    assert equal(read_state_dict(write_state_dict(tmp_path / "x.safetensors", tensors)).tensors, tensors)


def test_a_slice_of_a_large_tensor_is_written_alone(tmp_path):
    big = torch.zeros(1_000_000)
    path = write_state_dict(tmp_path / "x.ckpt", {"small": big[:10]})
    assert path.stat().st_size < 10_000


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    path = write_state_dict(tmp_path / name, TENSORS)
    before = path.read_bytes()
    with nearly_full(100_000), pytest.raises(UserError, match=f"{name} to write to, expected .* room"):
        write_state_dict(path, {"large": torch.zeros(100_000)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_writing_names_what_is_wrong_with_the_place(tmp_path):
    with pytest.raises(UserError, match="expected an existing folder"):
        write_state_dict(tmp_path / "none" / "x.safetensors", TENSORS)
    with pytest.raises(UserError, match=r"expected a name ending in \.safetensors"):
        write_state_dict(tmp_path / "x.txt", TENSORS)


def test_the_content_decides_not_the_suffix(tmp_path):
    path = write_state_dict(tmp_path / "x.safetensors", TENSORS).rename(tmp_path / "x.ckpt")
    assert equal(read_state_dict(path).tensors, TENSORS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_wrappers_and_bookkeeping_are_removed_and_named(tmp_path, zipped):
    content = {"epoch": 3, "global_step": 7, "animatediff_config": {"x": 1}, "state_dict": {"state_dict": TENSORS}}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    file = read_state_dict(tmp_path / "x.ckpt")
    assert equal(file.tensors, TENSORS)
    assert file.notes.count("unwrapped 'state_dict'") == 2


def test_flat_entries_that_are_no_tensors_are_named(tmp_path):
    torch.save(TENSORS | {"animatediff_config": {"x": 1}}, tmp_path / "x.ckpt")
    file = read_state_dict(tmp_path / "x.ckpt")
    assert equal(file.tensors, TENSORS)
    assert any("animatediff_config" in note for note in file.notes)


def test_the_controlnet_wrapper_is_removed(tmp_path):
    torch.save({"controlnet": TENSORS}, tmp_path / "x.ckpt")
    assert equal(read_state_dict(tmp_path / "x.ckpt").tensors, TENSORS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_models_are_removed(tmp_path, prefix):
    torch.save({prefix + key: t for key, t in TENSORS.items()}, tmp_path / "x.ckpt")
    file = read_state_dict(tmp_path / "x.ckpt")
    assert equal(file.tensors, TENSORS)
    assert any(prefix[:6] in note for note in file.notes)


def test_module_inside_a_name_stays(tmp_path):
    tensors = {"module.a": torch.zeros(1), "b.module.c": torch.zeros(1)}
    torch.save(tensors, tmp_path / "x.ckpt")
    assert read_state_dict(tmp_path / "x.ckpt").tensors.keys() == tensors.keys()


def test_groups_of_state_dicts_are_flattened(tmp_path):
    torch.save({"image_proj": {"a": torch.zeros(1)}, "ip_adapter": {"b": torch.zeros(1)}}, tmp_path / "x.bin")
    assert set(read_state_dict(tmp_path / "x.bin").tensors) == {"image_proj.a", "ip_adapter.b"}


def test_training_bookkeeping_classes_are_not_needed(tmp_path, monkeypatch):
    """Old LDM checkpoints mention a callback of a library that is not installed."""
    package, _, name = pickles.BOOKKEEPING_CLASSES[0].rpartition(".")
    callback = type(name, (), {"__module__": package})
    with monkeypatch.context() as installed:
        parents = package.split(".")
        for i in range(len(parents)):
            module = types.ModuleType(".".join(parents[: i + 1]))
            installed.setitem(sys.modules, module.__name__, module)
        setattr(module, name, callback)
        content = {"state_dict": TENSORS, "callbacks": {callback: {"best": 1}}, "last": callback()}
        torch.save(content, tmp_path / "x.ckpt")
    assert package not in sys.modules
    assert equal(read_state_dict(tmp_path / "x.ckpt").tensors, TENSORS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, zipped):
    content = {"state_dict": TENSORS, "x": RunsCode(tmp_path / "made")}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would execute code while loading \(\w+\.mkdir\)"):
        read_state_dict(tmp_path / "x.ckpt")
    assert not (tmp_path / "made").exists()


def test_an_object_of_an_unknown_class_is_refused_by_name(tmp_path):
    torch.save({"a": torch.zeros(1), "counts": collections.Counter("ab"), "path": tmp_path}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"would execute code while loading \(pathlib"):
        read_state_dict(tmp_path / "x.ckpt")


def safetensors(header: str) -> bytes:
    """A file of this header and four bytes of weights."""
    return len(header).to_bytes(8, "little") + header.encode() + bytes(4)


SAFE = b"\x10\0\0\0\0\0\0\0"
BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
    "html2": (b"<html>404</html>", "an HTML page"),
    "html3": ("\ufeff<!-- Überlastet -->\n<html>".encode(), "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 42\n", "Git-LFS pointer"),
    "json": (b'{"error": "Repository not found"}', "a JSON document"),
    "text": (b"Invalid username or password.", "plain text .*Invalid username"),
    "noise": (bytes(range(7, 200)) * 9, "damaged"),
    "no header": (SAFE + b"{not json at all", "damaged safetensors header"),
    "odd header": (SAFE + b'{"a":[1,2,3] }  ', "damaged safetensors header"),
    "odd type": (safetensors('{"a":{"dtype":"X9","data_offsets":[0,4],"shape":[1]}}'), "damaged safetensors.*X9"),
    "odd shape": (safetensors('{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[2]}}'), "damaged safetensors file"),
    "short header": (b"\xff\xff\0\0\0\0\0\0{", "truncated safetensors file.*at least 65543 bytes announced, 9 there"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_bad_files_are_named_for_what_they_are(tmp_path, name, suffix):
    content, message = BAD_FILES[name]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_state_dict(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read_state_dict(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="it is a folder"):
        read_state_dict(tmp_path)


def test_truncated_safetensors_say_both_sizes(tmp_path):
    path = write_state_dict(tmp_path / "x.safetensors", TENSORS)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(UserError, match=f"truncated.*: {len(content)} bytes announced, {len(content) - 5} there"):
        read_state_dict(path)
    path.write_bytes(content + b"more")
    with pytest.raises(UserError, match=f"with {len(content) + 4} bytes, expected {len(content)}"):
        read_state_dict(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_pickles_at_any_length(tmp_path, zipped):
    torch.save(TENSORS, tmp_path / "whole", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole").read_bytes()
    for length in (2, 3, 11, 60, 200, len(content) // 2, len(content) - 1):
        (tmp_path / "x.ckpt").write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged|truncated"):
            read_state_dict(tmp_path / "x.ckpt")


def test_archives_and_objects_that_are_no_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match="a zip archive that holds no readable torch weights"):
        read_state_dict(tmp_path / "x.ckpt")
    torch.save([torch.zeros(1)], tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="holding a list.*expected named tensors"):
        read_state_dict(tmp_path / "x.ckpt")
    torch.save({"epoch": 1}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="without a single tensor"):
        read_state_dict(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UserError, match="damaged or of another kind"):
        read_state_dict(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "x.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_state_dict(tmp_path / "x.pt")


def write_shards(folder: Path) -> Path:
    write_state_dict(folder / "m-1.safetensors", {"a.weight": TENSORS["a.weight"]})
    write_state_dict(folder / "m-2.safetensors", {key: TENSORS[key] for key in "bc"})
    index = folder / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}}')
    return index


def test_shards_are_joined(tmp_path):
    assert equal(read_state_dict(write_shards(tmp_path)).tensors, TENSORS)


def test_missing_shards_and_tensors_are_named(tmp_path):
    index = write_shards(tmp_path)
    write_state_dict(tmp_path / "m-2.safetensors", {"b": TENSORS["b"]})
    with pytest.raises(UserError, match="without 1 tensors it lists, such as c"):
        read_state_dict(index)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"without its part m-2\.safetensors"):
        read_state_dict(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        read_state_dict(index)


def test_weights_are_found_in_order_of_preference(tmp_path):
    order = ["m.safetensors", "m.safetensors.index.json", "p.bin", "m.fp16.safetensors", "p.fp16.bin"]
    for name in reversed(order):
        (tmp_path / name).touch()
        assert find_weights(tmp_path, "m", "p") == tmp_path / name
    assert find_weights(tmp_path, "other", "p2") is None


def test_hashes_follow_the_content(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"other")
    assert file_sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_a_folders_hash_covers_its_weights(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"one")
    first = file_sha256(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"no weights")
    assert file_sha256(tmp_path) == first
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"other")
    assert file_sha256(tmp_path) != first
