"""`torchrun scripts/train.py`, as a user starts it: the number of processes changes the pace and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from animatediff.lab.stage_table import load_train_config

ROOT = Path(__file__).parents[2]
SIZES = {"channels": [8, 8], "width": 8, "text_layers": 1, "text_heads": 2}
LOOP = {"steps": 4, "batch_size": 2, "micro_batches": 8, "learning_rate": 1e-3, "schedule": "constant", "log_every": 1}
ENCODER = {"stage": "shapes_encoder", "encoder": SIZES, "loop": LOOP | {"warmup_steps": 0}}


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(ENCODER | {"output_dir": str(tmp_path / "one")}))
    return tmp_path / "train.yaml"


def launch(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*torchrun, "scripts/train.py", "--device", "cpu", "--config", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["step"] == 4
    return {f"{part}.{name}": tensor for part in ("model", "ema") for name, tensor in state[part].items()}


def check_same_as_one_process(config: Path, processes: int) -> None:
    """All at once, or stopped after two steps and taken up: bit by bit the same; and up to rounding, one process's."""
    folder = config.parent
    load_train_config(config).run(lambda line: None)
    for run, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        done = launch(processes, config, f"output_dir={folder / run}", f"loop.steps={steps}")
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr and "Traceback" not in done.stderr
        assert done.stdout.count(f"encoder {steps}/{steps} loss") == 1  # what all have to say, one says
    one, whole, halves = (weights(folder / run) for run in ("one", "whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    # Adam divides gradients by their size: rounding that is relative to the gradient moves a weight by at most as much
    # of the rate in every step, wherever the gradient is no rounding itself.
    moved = torch.cat([(whole[name] - one[name]).flatten() for name in one]).abs()
    assert moved.max() < 2 * 4 * LOOP["learning_rate"] and moved.quantile(0.99) < 1e-2 * LOOP["learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes(config, processes):
    check_same_as_one_process(config, processes)


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(config, tmp_path):
    """Where the first cannot write its log, the other does not wait for it: one line, and soon."""
    (tmp_path / "one/log.jsonl").mkdir(parents=True)
    failed = launch(2, config)
    assert failed.returncode != 0
    (line,) = re.findall("^error: .*", failed.stderr, re.M)
    assert "log.jsonl" in line and 'scripts/train.py", line' not in failed.stderr
