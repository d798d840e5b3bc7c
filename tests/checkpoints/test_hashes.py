"""Hashes by which files are known, and how long they are remembered."""

import hashlib
import json
import os
import struct

import pytest

from animatediff.checkpoints import hashes
from animatediff.checkpoints.files import begin_hashing, file_sha256
from animatediff.checkpoints.hashes import Hashes, file_hashes
from animatediff.utils import cache_folder


def safetensors(path, body: bytes):
    header = json.dumps({"__metadata__": {"ss_output_name": "x"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def test_every_hash_that_programs_show(tmp_path):
    body = bytes(range(256)) * 6000  # 1.5 MB
    lora = safetensors(tmp_path / "lora.safetensors", body)
    found, data = file_hashes(lora), lora.read_bytes()
    assert found.sha256 == hashlib.sha256(data).hexdigest() == file_sha256(lora)
    assert found.weights == hashlib.sha256(body).hexdigest()
    assert found.sample == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    for digits in (found.sha256[:10], found.sha256, found.weights[:12].upper(), found.sample):
        assert found.match(digits)
    assert not found.match(found.sha256[:7]) and not found.match("") and not found.match("0" * 10)


def test_small_and_damaged_files_have_no_more_hashes_than_they_can(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "liar.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert file_hashes(tmp_path / "a.ckpt") == Hashes(hashlib.sha256(b"x").hexdigest())
    nothing = hashlib.sha256(b"").hexdigest()
    assert file_hashes(tmp_path / "empty.safetensors") == Hashes(nothing, nothing)
    assert file_hashes(tmp_path / "liar.safetensors").weights == nothing


@pytest.fixture
def remembering(tmp_path, monkeypatch):
    """A cache folder of its own, every file large enough, and the files whose hash was computed."""
    computed, compute = [], hashes._compute
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 0)
    monkeypatch.setattr(hashes, "_compute", lambda path: computed.append(path.name) or compute(path))
    hashes._hashes.cache_clear()
    yield computed
    hashes._hashes.cache_clear()


def old(path, content: bytes, seconds: int = 100):
    path.write_bytes(content)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))
    return path


def test_large_files_are_hashed_once_for_all_processes(tmp_path, remembering):
    path = old(tmp_path / "a.ckpt", b"one")
    first = file_hashes(path)
    hashes._hashes.cache_clear()  # as another process begins
    assert file_hashes(path) == first and remembering == ["a.ckpt"]
    assert str(path) in json.loads((cache_folder() / "hashes.json").read_text())
    old(path, b"two")  # as large and as old; its modification time differs by what passed since
    assert file_hashes(path).sha256 == hashlib.sha256(b"two").hexdigest()
    replaced = path.stat()
    path.rename(tmp_path / "elsewhere")
    path.write_bytes(b"ten")
    os.utime(path, ns=(replaced.st_atime_ns, replaced.st_mtime_ns))  # another file, of the same size and time
    assert file_hashes(path).sha256 == hashlib.sha256(b"ten").hexdigest()


def test_what_was_written_just_now_is_not_remembered(tmp_path, remembering):
    """Within a tick of the clock it may change once more unseen."""
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"one")
    file_hashes(path)
    assert not (cache_folder() / "hashes.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"PATH": [1]}', '{"PATH": "x"}', '{"PATH": null}'])
def test_a_broken_cache_is_no_cache(tmp_path, remembering, content):
    path = old(tmp_path / "a.ckpt", b"one")
    (cache_folder() / "hashes.json").parent.mkdir(parents=True)
    (cache_folder() / "hashes.json").write_text(content.replace("PATH", str(path)))
    assert file_hashes(path).sha256 == hashlib.sha256(b"one").hexdigest()


def test_where_nothing_can_be_written_nothing_is_remembered(tmp_path, remembering, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_hashes(old(tmp_path / "a.ckpt", b"one")).sha256 == hashlib.sha256(b"one").hexdigest()


def test_the_oldest_are_forgotten(tmp_path, remembering, monkeypatch):
    monkeypatch.setattr(hashes, "MOST_REMEMBERED", 2)
    for name in "abc":
        file_hashes(old(tmp_path / f"{name}.ckpt", name.encode()))
    assert [path[-6] for path in json.loads((cache_folder() / "hashes.json").read_text())] == ["b", "c"]


def test_a_hash_that_was_begun_is_not_computed_again(tmp_path, remembering):
    """Neither is a file that is not there any trouble for the thread."""
    path = old(tmp_path / "a.ckpt", b"one")
    begin_hashing(tmp_path / "gone.ckpt")
    begin_hashing(path)
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest() and remembering == ["a.ckpt"]
