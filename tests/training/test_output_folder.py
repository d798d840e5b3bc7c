"""The folder of a training: one run at a time, files whole or not at all, and damaged ones named."""

import multiprocessing
import os
import resource
import signal
from typing import ClassVar

import pytest
import torch

from animatediff.config.settings import build, options
from animatediff.training.latents import made_from
from animatediff.training.loop import train
from animatediff.training.output_folder import read_tensors, training_folder, write_tensors
from animatediff.training.record import keep_steps
from animatediff.training.stage_config import StageConfig
from animatediff.utils import UserError
from tests.training.line import CONFIG, Line, quiet

FORK = multiprocessing.get_context("fork")


def in_child(function, *arguments):
    """What a function returns in another process."""
    queue = FORK.SimpleQueue()
    child = FORK.Process(target=lambda: queue.put(function(*arguments)))
    child.start()
    result = queue.get()
    child.join()
    return result


def try_to_enter(folder) -> str:
    try:
        with training_folder(folder):
            return "entered"
    except UserError as error:
        return str(error)


def test_one_training_at_a_time(tmp_path):
    with training_folder(tmp_path / "new/run") as folder:
        said = in_child(try_to_enter, folder)
        assert "in which another training is at work" in said and "\n" not in said
        assert in_child(try_to_enter, folder / "inner") == "entered"
    assert in_child(try_to_enter, folder) == "entered"


def test_a_killed_training_frees_its_folder_at_once_and_its_leftovers_are_removed(tmp_path):
    ready = FORK.Event()

    def hold():
        with training_folder(tmp_path) as folder, open(folder / ".lock"):
            (folder / ".tmp-abc").mkdir()
            (folder / ".tmp-abc/state.pt").write_bytes(b"half")
            reader = FORK.Process(target=signal.pause)  # as readers of clips, which outlive it for a moment
            reader.start()
            (folder / "reader").write_text(str(reader.pid))
            ready.set()
            signal.pause()

    child = FORK.Process(target=hold)
    child.start()
    ready.wait(20)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    try:
        with training_folder(tmp_path) as folder:
            assert sorted(path.name for path in folder.iterdir()) == [".lock", "reader"]
        assert [path.name for path in tmp_path.iterdir()] == ["reader"]
    finally:
        os.kill(int((tmp_path / "reader").read_text()), signal.SIGKILL)


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path):
    """Every file is tried: no byte more than the limit can be written to any."""
    train(Line(), CONFIG, tmp_path, log=quiet)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "state.pt").unlink()  # so that it goes on, from the checkpoint before

    def run(limit: int) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            train(Line(), CONFIG, tmp_path, log=quiet)
            return "done"
        except (UserError, OSError) as error:
            return str(error)

    for limit in (100, 1500, 4000):  # the log, the first bytes of a checkpoint, its end
        said = in_child(run, limit)
        assert "too large" in said and str(tmp_path) in said and "\n" not in said
        assert (tmp_path / "state.previous.pt").read_bytes() == files["state.previous.pt"]
        assert not (tmp_path / "state.pt").exists()
    assert in_child(run, 10**6) == "done"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


@options
class Hungry(StageConfig):
    """A stage that asks for an exabyte."""

    name: ClassVar[str] = "hungry"

    def train(self, folder, log, device):
        torch.empty(2**58, device=device)


def test_a_full_memory_is_one_line(tmp_path):
    with pytest.raises(UserError, match="^got a training that takes more memory than there is on cpu"):
        Hungry(output_dir=str(tmp_path)).run(quiet)


@pytest.mark.parametrize("output_dir", ["", " "])
def test_a_training_has_a_folder(output_dir):
    with pytest.raises(UserError, match="x.yaml: output_dir: got an empty text, expected a folder to write into"):
        build(Hungry, {"output_dir": output_dir}, where="x.yaml")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "a tensor", "no keys"])
def test_a_damaged_file_of_its_own_is_named_with_what_to_do(tmp_path, damage):
    path = tmp_path / "clips.pt"
    write_tensors(path, {"key": 1, "latents": torch.zeros(3), "tokens": torch.zeros(3)})
    assert made_from(path, {"key": 1}) and made_from(path, {"key": 2}) is None
    whole = path.read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}
    if damage in content:
        path.write_bytes(content[damage])
    else:
        torch.save(torch.zeros(2) if damage == "a tensor" else {"key": 1}, path)
    with pytest.raises(UserError, match=r"clips.pt, which cannot be read \(.*delete it and run again, which encodes"):
        made_from(path, {"key": 1})


@pytest.mark.parametrize("part", ["config", "step", "model", "ema", "optimizer", "scaler", "stage"])
@pytest.mark.parametrize("value", [None, [], {}, "x", 3.5, {"weight": torch.zeros(1)}], ids=str)
def test_a_checkpoint_of_which_a_part_is_something_else(tmp_path, part, value):
    """It is named; but what this run does not use."""
    train(Line(), CONFIG, tmp_path, log=quiet)
    state = read_tensors(tmp_path / "state.pt", keys=set(), remedy="")
    torch.save({name: value if name == part else own for name, own in state.items()}, tmp_path / "other.pt")
    os.replace(tmp_path / "other.pt", tmp_path / "state.pt")
    try:
        train(Line(), CONFIG, tmp_path, log=quiet)
        assert part in ("scaler", "stage")
    except UserError as error:
        assert "state.pt, which cannot be read" in str(error) or "as it began" in str(error)


def test_lines_of_a_log_that_are_none_are_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        '{"step": 1}',
        '{"loss": 2}',
        "[]",
        "3",
        "null",
        '{"step": [1]}',
        "[" * 100_000,
        '{"step": 9}',
        '{"step": 2}',
    ]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"step"')
    keep_steps(path, 4)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
