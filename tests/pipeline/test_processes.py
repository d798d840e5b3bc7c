"""Processes that make the clips of a run together: the queue, and `torchrun` as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import DistStoreError, HashStore
from tqdm import tqdm

from animatediff.config.prompt_yaml import load_config
from animatediff.features.feature import in_turn
from animatediff.pipeline import processes
from animatediff.pipeline.device import own_device
from animatediff.pipeline.processes import ManyProcesses, OneProcess, launched
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from tests.nano import entry, write_config

ROOT = Path(__file__).parents[2]


@dataclass
class Clip:
    number: int
    made: bool = False


def team(number: int) -> list[ManyProcesses]:
    store = HashStore()
    return [ManyProcesses(store, rank, number) for rank in range(number)]


def make(clips: list[Clip], lost: set[int], process: OneProcess) -> list[int]:
    """The clips that a process has taken; of those that are lost, it is the first one alone that makes them."""
    taken = []
    with tqdm(total=3 * len(clips), disable=not process.first) as bar:
        for clip in process.take(clips, bar):
            taken.append(clip.number)
            for _ in range(3):
                time.sleep(0.001)
                process.stepped(bar)
            clip.made = process.first or clip.number not in lost
        assert not process.first or bar.n == bar.total
    return taken


def at_once(work, members: list[ManyProcesses]) -> list:
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(work, members))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_clip_is_taken_once(number):
    clips = [Clip(i) for i in range(20)]
    members = team(number) if number > 1 else [OneProcess()]
    taken = at_once(partial(make, clips, set()), members)
    assert sorted(sum(taken, [])) == list(range(20)) and all(clip.made for clip in clips)
    assert all(own == sorted(own) for own in taken)


def test_what_others_leave_undone_the_first_makes():
    clips = [Clip(i) for i in range(12)]
    first, *others = at_once(partial(make, clips, {3, 4, 7, 11}), team(3))
    assert all(clip.made for clip in clips)
    assert {number for own in others for number in own} & {3, 4, 7, 11} <= set(first)


def test_a_silent_process_is_not_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(processes, "SILENCE", 0.3)
    clips = [Clip(i) for i in range(3)]
    first, dead = team(2)
    with tqdm(disable=True, total=9) as bar:
        assert next(dead.take(clips, bar)).number == 0
    assert make(clips, set(), first) == [1, 2, 0]
    assert "other processes are silent" in capsys.readouterr().err


def test_the_first_alone_begins_and_all_know(capsys):
    calls = []

    def begin() -> tuple[Path, int]:
        calls.append(1)
        return Path("a"), 2

    members = team(3)
    assert at_once(lambda process: process.once(begin), members) == [(Path("a"), 2)] * 3 and calls == [1]
    at_once(lambda process: process.tell_once("all have to say this"), members)
    assert capsys.readouterr().err == "all have to say this\n"


def test_a_mistake_of_all_is_told_by_one():
    def fail(process: ManyProcesses) -> str:
        try:
            with process.one_error():
                raise UserError("got nothing")
        except UserError:
            return "told"
        except SystemExit as end:
            return f"exit {end.code}"

    assert sorted(at_once(fail, team(3))) == ["exit 2", "exit 2", "told"]


def test_a_store_that_is_gone_is_no_traceback():
    first, _ = team(2)
    with pytest.raises(UserError, match="another one has ended, which says why"), first.one_error():
        raise DistStoreError("got no answer")


def test_variables_that_are_missing_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="got WORLD_SIZE=2, expected torchrun or none: .*RANK"):
        launched()


def test_a_gpu_for_each_process(monkeypatch):
    chosen = []
    for name, value in {"is_available": True, "device_count": 2}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert str(own_device()) == "cuda:1" == str(chosen[0])
    assert str(own_device("cuda:0")) == "cuda:0" and str(own_device("cpu")) == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="got 3 processes for 2 GPUs, expected one for each: --nproc_per_node 2"):
        own_device("cuda")


# ---- torchrun -------------------------------------------------------------------------------------------------


def start(number: int, *arguments: object) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command = [*torchrun, "scripts/animate.py", "--device", "cpu", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env)


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run(nano, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A config of two entries, seven prompts, and its files, made by one process."""
    folder = tmp_path_factory.mktemp("processes")
    first = entry(nano, prompt=["a", "b", "c", "d"], seed=[1, 2, 3, 4], steps=20)
    second = entry(
        nano, prompt=["e", "f", "g"], H=24, steps=20, format="png", motion_module=str(nano / "mm_v2.safetensors")
    )
    config = write_config(folder / "many.yaml", first, second)
    animate(load_config(config), output_dir=folder / "one", device="cpu")
    return config, contents(folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_the_files_of_one_process(run, tmp_path, number):
    config, expected = run
    code, out, err = finished(start(number, "--config", config, "--output-dir", tmp_path / "out"))
    assert code == 0 and "Traceback" not in err, err
    assert contents(tmp_path / "out") == expected
    assert len(out.split()) == 8 and out.split()[-1].endswith("sample.gif")  # each path once, the grid at last
    shown = [int(done) for done in re.findall(r"(\d+)/140 ", err)]
    assert shown == sorted(shown) and shown[-1] == 140, err  # one bar, with everyone's steps
    assert err.count("sd1-checkpoint") == 1
    code, out, err = finished(start(number, "--config", config, "--output-dir", tmp_path / "out"))
    assert code == 0 and not out and err.count("7 of 7 prompts are there already") == 1


@pytest.mark.slow
def test_batches_are_shared_out(run, tmp_path):
    """What one process makes of them."""
    config, _ = run
    animate(load_config(config, {"batch_size": 2}), output_dir=tmp_path / "one", device="cpu")
    code, out, err = finished(start(2, "--config", config, "--output-dir", tmp_path / "two", "batch_size=2"))
    assert code == 0 and len(out.split()) == 8, err
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed(run, tmp_path, victim):
    """torchrun ends all; the same command makes the rest, and all files are as if nothing had been."""
    config, expected = run
    out = tmp_path / "out"
    process = start(2, "--config", config, "--output-dir", out)
    deadline = time.monotonic() + 120
    while not [*out.glob("sample/*.gif")] and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[victim]), signal.SIGKILL)
    code, _, err = finished(process)
    assert code != 0 and not (out / "sample.gif").exists(), err
    code, _, err = finished(start(2, "--config", config, "--output-dir", out))
    assert code == 0, err
    assert contents(out) == expected


@pytest.fixture(scope="module")
def split(nano, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Clips in windows, one of which is a whole step at the end; and clips without, part by part; by one process."""
    folder = tmp_path_factory.mktemp("split")
    long = entry(
        nano, prompt=["a", "b"], L=11, windows="open", window_length=4, window_overlap=1,
        motion_module=str(nano / "mm_v2.safetensors"), sampler="euler_ancestral",
    )  # fmt: skip
    short = entry(nano, prompt=["c", "d"], split_guidance=True, pag_scale=2.0, format="png")
    config = write_config(folder / "split.yaml", long, short)
    animate(load_config(config), output_dir=folder / "one", device="cpu")
    return config, contents(folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_processes_that_make_each_clip_together(split, tmp_path, number):
    """The files of one process, bit by bit; also of a run that is taken up."""
    config, expected = split
    out = tmp_path / "out"
    for made in (0, 3):
        code, said, err = finished(start(number, "--config", config, "--output-dir", out, "--split-clips"))
        assert code == 0 and "Traceback" not in err, err
        assert contents(out) == expected
        assert len(said.split()) == 5 - made and err.count("sd1-checkpoint") == (1 if made else 2)
        next(out.glob("sample/1-*")).unlink()
        (out / "sample.gif").unlink()


def test_what_processes_cannot_share_is_refused(nano, tmp_path):
    config = load_config(write_config(tmp_path / "one.yaml", entry(nano, guidance_scale=1)))
    process = OneProcess()
    with pytest.raises(UserError, match="got --split-clips in one process, expected several"):
        process.splitting()
    process.spread = in_turn
    with pytest.raises(UserError, match="entry 1: got --split-clips for clips without windows and guidance"):
        animate(config, output_dir=tmp_path / "out", device="cpu", processes=process)


@pytest.mark.slow
def test_a_mistake_is_one_line(run, tmp_path):
    config, _ = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    for arguments, message in (
        (["--steps", "0"], "steps"),  # found by all before torch is imported
        (["--dtype", "int8"], "got dtype 'int8'"),
        (["--output-dir", tmp_path / "out"], "holds no config.yaml"),  # found by the first alone
    ):
        code, out, err = finished(start(3, "--config", config, *arguments))
        (line,) = re.findall("^error: .*", err, re.M)
        assert code != 0 and not out and message in line
        assert re.search(r"exitcode\s*: 2 ", err) and 'scripts/animate.py", line' not in err
