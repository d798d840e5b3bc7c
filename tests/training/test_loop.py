"""The loop on a network of one matrix: it learns, stops, goes on, and says what it does."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from animatediff.config.settings import build
from animatediff.training.loop import LoopConfig, rate_factor, train
from animatediff.training.record import duration
from animatediff.utils import UserError
from tests.training.line import CONFIG, Line, quiet

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [13, 30])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, at):
    whole = Line()
    train(whole, CONFIG, tmp_path / "whole", log=quiet)
    killed = Line()
    loss = killed.loss

    def dies(step, *rest):
        if step == at:
            raise Killed
        return loss(step, *rest)

    killed.loss = dies
    with pytest.raises(Killed):
        train(killed, CONFIG, tmp_path / "run", log=quiet)
    again = Line()
    train(again, CONFIG, tmp_path / "run", log=quiet)
    assert again.calls == CONFIG.steps - at // 10 * 10
    assert all(torch.equal(again.exported[k], v) for k, v in whole.exported.items())


@pytest.mark.slow
def test_a_run_that_is_killed_outright_goes_on_to_the_same_files(tmp_path):
    """SIGKILL in a step, then SIGKILL while a checkpoint is half written."""
    train(Line(), CONFIG, tmp_path / "whole", log=quiet)
    for where, step in (("step", 10), ("save", 20)):
        command = [sys.executable, "-m", "tests.training.line", str(tmp_path / "run"), where]
        killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
        assert killed.returncode == -signal.SIGKILL
        assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == step
    (left,) = (tmp_path / "run").glob(".tmp-*/state.pt")
    assert left.read_bytes() == b"half of a checkpoint"
    train(Line(), CONFIG, tmp_path / "run", log=quiet)
    assert same_runs(tmp_path / "whole", tmp_path / "run")
    exports = [torch.load(tmp_path / name / "line.pt", weights_only=True) for name in ("whole", "run")]
    assert all(torch.equal(exports[0][k], exports[1][k]) for k in exports[0])


def same_runs(one: Path, two: Path) -> bool:
    """Bit by bit, the checkpoint before the last too."""
    for name in ("state.pt", "state.previous.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (one, two)]
        parts = [{k: s[k] for k in ("step", "model", "ema", "optimizer", "scaler")} for s in states]
        torch.testing.assert_close(parts[1], parts[0], rtol=0, atol=0)
    return True


def test_float16_goes_on_to_the_same_weights(tmp_path):
    """The first losses overflow at the scale they start with; a run that goes on starts with what was found."""
    train(Line(torch.float16), CONFIG, tmp_path / "whole", log=quiet)
    killed = Line(torch.float16)
    loss = killed.loss

    def dies(step, *rest):
        if step == 25:
            raise Killed
        return loss(step, *rest)

    killed.loss = dies
    with pytest.raises(Killed):
        train(killed, CONFIG, tmp_path / "run", log=quiet)
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["scaler"]["scale"] < 2**16
    train(Line(torch.float16), CONFIG, tmp_path / "run", log=quiet)
    assert same_runs(tmp_path / "whole", tmp_path / "run")


def test_float16_learns(tmp_path):
    stage = Line(torch.float16)
    train(stage, replace(CONFIG, steps=200), tmp_path, log=quiet)
    assert torch.allclose(stage.exported["weight"], 2 * torch.eye(3), atol=0.05)


def test_a_float16_step_that_overflows_is_left_out(tmp_path):
    stage, weights = Line(torch.float16), []
    loss = stage.loss

    def huge(step, *rest):
        weights.append(stage.net.weight.detach().clone())
        value, numbers = loss(step, *rest)
        return value * (1e6 if step == 20 else 1), numbers

    stage.loss = huge
    train(stage, replace(CONFIG, log_every=1), tmp_path, log=quiet)
    assert torch.equal(weights[21], weights[20]) and not torch.equal(weights[22], weights[21])
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[20]["loss_scale"] == records[19]["loss_scale"] / 2
    assert "grad_norm" not in records[20]  # infinite, which is no JSON


def test_gradients_that_overflow_at_any_scale_stop_a_float16_run(tmp_path):
    stage = Line(torch.float16)
    stage.net.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(UserError, match="got gradients of norm (inf|nan) at step 16 of line"):
        train(stage, CONFIG, tmp_path, log=quiet)


def test_it_learns(tmp_path):
    stage = Line()
    train(stage, replace(CONFIG, steps=200), tmp_path, log=quiet)
    assert torch.allclose(stage.exported["weight"], 2 * torch.eye(3), atol=0.05)


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    train(Line(), CONFIG, tmp_path, log=quiet)
    with pytest.raises(UserError, match="got batch_size=4 .* expected 8"):
        train(Line(), replace(CONFIG, batch_size=4), tmp_path, log=quiet)


def test_another_network_in_the_same_folder_is_refused(tmp_path):
    train(Line(), CONFIG, tmp_path, log=quiet)
    other = Line()
    other.net = torch.nn.Linear(3, 4)
    with pytest.raises(UserError, match=r"got bias.shape=\(4,\) .* expected \(3,\) as it began"):
        train(other, CONFIG, tmp_path, log=quiet)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    stage = Line()
    loss = stage.loss
    stage.loss = lambda step, *rest: (loss(step, *rest)[0] * (float("nan") if step == 25 else 1), {})
    with pytest.raises(UserError, match="got loss nan at step 25"):
        train(stage, CONFIG, tmp_path, log=quiet)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 20


def test_a_run_that_began_before_a_setting_existed_goes_on(tmp_path):
    train(Line(), replace(CONFIG, steps=10), tmp_path, log=quiet)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["config"]["schedule"], state["stage"], state["scaler"]  # which are newer
    torch.save(state, tmp_path / "state.pt")
    again = Line()
    train(again, replace(CONFIG, steps=10), tmp_path, log=quiet, stage_config=StageConfig())
    assert again.calls == 0
    with pytest.raises(UserError, match="got schedule=constant .* expected cosine as it began"):
        train(Line(), replace(CONFIG, steps=10, schedule="constant"), tmp_path, log=quiet)


def test_scalars_for_tensorboard(tmp_path, monkeypatch):
    wanted = replace(CONFIG, steps=2, log_every=1, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="which is not installed: pip install"):
        train(Line(), wanted, tmp_path / "without", log=quiet)
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path / "with/tensorboard"), 1)

        def add_scalar(self, name, value, step):
            written.append((step, name))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    train(Line(), wanted, tmp_path / "with", log=quiet)
    assert written == [(step, name) for step in (1, 2) for name in ("loss", "lr", "grad_norm", "steps_per_s")]


def test_a_run_that_goes_on_cuts_what_its_log_says_of_later_steps(tmp_path):
    shown, every = [], replace(CONFIG, steps=12, log_every=1)
    stage = Line()
    loss = stage.loss
    stage.loss = lambda step, *rest: (loss(step, *rest)[0] * (float("nan") if step == 11 else 1), {})
    with pytest.raises(UserError):
        train(stage, every, tmp_path, log=quiet)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1')
    train(Line(), every, tmp_path, log=shown.append)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert lines[0].startswith('{"step": 1, "loss": ') and len(shown) == 2
    assert re.fullmatch(r"line 12/12 loss \d+\.\d{4} [\d.]+ steps/s, [\d.]+ samples/s, 0 s left", shown[1])


def test_on_a_terminal_there_is_a_bar_in_place_of_lines(tmp_path, monkeypatch):
    shown, terminal = [], io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(Line(), CONFIG, tmp_path, log=shown.append)
    assert not shown
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("line: 100%") and "40/40 [" in last and "samples/s" in last and "loss 0." in last


def test_durations():
    assert [duration(s) for s in (0.2, 89, 90, 5399, 5400, 360000)] == [
        "0 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
        "100.0 h",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"micro_batches": 0}, "micro_batches: got 0, expected at least 1"),
        ({"log_every": 0}, "log_every: got 0, expected at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0, expected at least 1"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0, expected more than 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0, expected more than 0"),
        ({"warmup_steps": -1}, "warmup_steps: got -1, expected at least 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1, expected at least 0"),
        ({"ema_decay": 2.0}, "ema_decay: got 2.0, expected less than 1"),
        ({"seed": -1}, "seed: got -1, expected at least 0"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(UserError, match=f"^x.yaml: {message}"):
        build(LoopConfig, asdict(CONFIG) | change, where="x.yaml")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_kept(tmp_path):
    train(Line(), CONFIG, tmp_path, log=quiet)
    state = tmp_path / "state.pt"
    whole, last = state.read_bytes(), torch.load(state, weights_only=True)
    for part in (len(whole) // 2, 10, 0):
        state.write_bytes(whole[:part])
        with pytest.raises(UserError, match=r"state.pt, which cannot be read .* goes on from state.previous.pt"):
            train(Line(), CONFIG, tmp_path, log=quiet)
    state.unlink()
    again = Line()
    train(again, CONFIG, tmp_path, log=quiet)
    assert again.calls == 10
    torch.testing.assert_close(torch.load(state, weights_only=True)["model"], last["model"], rtol=0, atol=0)


def test_a_run_may_go_on_with_another_learning_rate(tmp_path):
    train(Line(), CONFIG, tmp_path, log=quiet)
    (tmp_path / "state.pt").unlink()
    said = []
    train(Line(), replace(CONFIG, learning_rate=0.01), tmp_path, log=said.append)
    assert said[0] == "learning_rate 0.01 from step 30 on, 0.05 before"


@dataclass(frozen=True)
class Source:
    folder: str
    stride: int = 4


@dataclass(frozen=True)
class StageConfig:
    output_dir: str = "a"
    videos: Source | None = Source("clips")
    world: Source | None = None
    seed: int = 0


def test_another_stage_in_the_same_folder_is_refused(tmp_path):
    first = StageConfig()
    train(Line(), CONFIG, tmp_path, log=quiet, stage_config=first)
    train(Line(), CONFIG, tmp_path, log=quiet, stage_config=replace(first, output_dir="b"))
    for change, message in (
        ({"seed": 1}, "got seed=1 .* expected 0"),
        ({"videos": Source("clips", stride=8)}, "got videos.stride=8 .* expected 4"),
        ({"videos": None, "world": Source("world")}, "got videos=None .* expected Source as it began"),
    ):
        with pytest.raises(UserError, match=message):
            train(Line(), CONFIG, tmp_path, log=quiet, stage_config=replace(first, **change))


def test_samples_are_drawn_from_the_averages_and_change_nothing(tmp_path):
    plain, shown = Line(), Line()
    train(plain, CONFIG, tmp_path / "plain", log=quiet)
    seen = []

    class Sampler:
        every = 10

        def __call__(self, folder, step):
            seen.append((folder.name, step, shown.net.weight.detach().clone()))

    train(shown, CONFIG, tmp_path / "shown", log=quiet, sampler=Sampler())
    assert [entry[:2] for entry in seen] == [("samples", step) for step in (10, 20, 30, 40)]
    assert torch.equal(seen[-1][2], plain.exported["weight"])  # which are the averages, too
    assert all(torch.equal(shown.exported[k], v) for k, v in plain.exported.items())


def test_learning_rate_warms_up_and_falls():
    rates = [rate_factor(CONFIG, step) for step in range(CONFIG.steps)]
    assert rates[0] == 0.25 and max(rates) == 1 and rates[-1] < 0.04
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = replace(CONFIG, schedule="constant")
    assert [rate_factor(constant, step) for step in (0, 3, 4, 39)] == [0.25, 1, 1, 1]


def test_more_processes_than_micro_batches_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("animatediff.training.loop.rank_and_world_size", lambda: (0, 2))
    with pytest.raises(UserError, match="got 2 processes for micro_batches=1, expected a divisor"):
        train(Line(), CONFIG, tmp_path, log=quiet)


def test_a_finished_run_may_be_made_longer(tmp_path):
    """With a constant rate it is then as if it had been meant so; with a cosine it says what becomes of the rate."""
    constant = replace(CONFIG, schedule="constant", warmup_steps=0)
    whole, longer, lines = Line(), Line(), []
    train(whole, constant, tmp_path / "whole", log=quiet)
    train(Line(), replace(constant, steps=25), tmp_path / "run", log=quiet)
    train(longer, constant, tmp_path / "run", log=lines.append)
    assert lines[0] == "40 steps in place of 25: the constant learning rate stays"
    assert all(torch.equal(longer.exported[k], v) for k, v in whole.exported.items())
    lines.clear()
    train(Line(), constant, tmp_path / "run", log=lines.append)
    assert lines == ["line: all 40 steps are done already; with more, it goes on from there"]
    with pytest.raises(UserError, match="got steps=39 for the run in .*, expected at least the 40 that it has done"):
        train(Line(), replace(constant, steps=39), tmp_path / "run", log=quiet)
    train(Line(), replace(CONFIG, steps=25), tmp_path / "cosine", log=quiet)
    train(Line(), CONFIG, tmp_path / "cosine", log=lines.append)
    assert "40 steps in place of 25: the cosine learning rate is from step 25 on that of a run of 40" in lines
