"""The training loop: optimizer, schedule, averaging, log, checkpoints. What is trained is a `Stage`'s business.

Randomness is a function of (seed, step), never of how a run got there, so a run that was killed and repeated goes on to
the same weights. A step averages `micro_batches` losses; the processes of `torchrun` share them out, so their number
changes the pace and not the result.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from animatediff.config.settings import Float, Int, opt, options
from animatediff.training.distributed import (
    first_process_first,
    gathered,
    mean_over_processes,
    rank_and_world_size,
    shared_loss,
    without_sharing,
)
from animatediff.training.losses import MAX_FACTOR
from animatediff.training.record import Record
from animatediff.training.run_state import RunState
from animatediff.utils import UserError


@options
class LoopConfig:
    """How long and how fast, in which batches."""

    steps: Int = opt(..., "of the optimizer", ge=1)
    batch_size: Int = opt(..., "samples of one micro-batch", ge=1)
    learning_rate: Float = opt(..., "of AdamW, at its highest", gt=0, le=1e6)
    micro_batches: Int = opt(1, "averaged in one step", ge=1)
    schedule: Literal["cosine", "constant"] = opt("cosine", "of the learning rate after the warm-up")
    warmup_steps: Int = opt(100, "in which the learning rate rises", ge=0)
    weight_decay: Float = opt(0.01, "of AdamW", ge=0, le=MAX_FACTOR)
    max_grad_norm: Float = opt(1.0, "to which gradients are clipped", gt=0, le=MAX_FACTOR)
    ema_decay: Float = opt(0.999, "of the averaged weights, which are what is saved; 0: no average", ge=0, lt=1)
    seed: Int = opt(0, "of all that is drawn in the steps", ge=0, lt=2**32)
    log_every: Int = opt(20, "steps", ge=1)
    checkpoint_every: Int = opt(200, "steps", ge=1)
    tensorboard: bool = opt(False, "scalars for TensorBoard too, in output_dir/tensorboard")


Batch = tuple[Tensor, list[str]]  # the loss of a micro-batch, and what it was computed from


class Stage(ABC):
    """What one training stage is."""

    name: str
    scale_loss: bool = False  # before the backward pass, so that gradients fit into float16

    @abstractmethod
    def modules(self) -> nn.Module:
        """The module, on its device, whose parameters with `requires_grad` are trained and averaged."""

    @abstractmethod
    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss of micro-batch `index` of the whole run, and numbers to log."""

    def names(self) -> list[str]:
        """What the last loss was computed from, for messages."""
        return []

    @abstractmethod
    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write the weights now in the modules as files that the loader reads."""


class Sampler(Protocol):
    """Shows what was learnt so far."""

    every: int  # steps

    def __call__(self, folder: Path, step: int) -> None:
        """Write clips of the weights now in the modules into `folder`."""
        ...


def rate_factor(config: LoopConfig, step: int) -> float:
    """What multiplies the learning rate: a linear warm-up, then 1 for ever, or a cosine down to a hundredth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def batch_generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed((seed << 32) + index)


def step_gradients(
    loss_of: nn.Module,
    config: LoopConfig,
    step: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[float, list[Batch], dict[str, float]]:
    """Give the parameters of `shared_loss` the gradients of a step, averaged over all processes' micro-batches.

    Returns the average loss, this process's batches, and the stage's numbers of the last.
    """
    rank, processes = rank_and_world_size()
    own = range(rank, config.micro_batches, processes)
    stage = getattr(loss_of, "module", loss_of).stage
    batches, numbers = [], {}
    for micro in own:
        index = step * config.micro_batches + micro
        with nullcontext() if micro == own[-1] else without_sharing(loss_of):
            loss, numbers = loss_of(index, config.batch_size, batch_generator(config.seed, index))
            loss = loss / len(own)
            scale(loss).backward()
        batches.append((loss.detach(), stage.names()))
    return mean_over_processes(sum(loss for loss, _ in batches)).item(), batches, numbers


class Trainer:
    """Parameters, their averages, optimizer and schedule of one run.

    Args:
        stage: what is trained.
        config: of the loop.
    """

    def __init__(self, stage: Stage, config: LoopConfig):
        self.stage, self.config = stage, config
        self.named = [(n, p) for n, p in stage.modules().named_parameters() if p.requires_grad]
        self.parameters = nn.ParameterList(p for _, p in self.named)
        self.loss = shared_loss(stage, self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, foreach=True
        )
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=stage.scale_loss)
        self.average = AveragedModel(self.parameters, multi_avg_fn=self._average)
        self.average.update_parameters(self.parameters)  # which counts the start as the first

    def _average(self, averages: list[Tensor], now: list[Tensor], count: Tensor) -> None:
        """Exponential, with a decay that grows in the first steps to (1 + n) / (10 + n) after n of them."""
        decay = min(self.config.ema_decay, int(count) / (9 + int(count)))
        torch._foreach_lerp_(averages, now, 1 - decay)

    @property
    def averages(self) -> list[nn.Parameter]:
        return list(self.average.module)

    def start_at(self, step: int) -> None:
        """Go on after `step` steps, whose parameters, averages and optimizer state are there already."""
        self.average.n_averaged.fill_(step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.config.learning_rate
        self.schedule = LambdaLR(self.optimizer, functools.partial(rate_factor, self.config), last_epoch=step - 1)

    def step(self, step: int) -> dict[str, float]:
        """One step of the optimizer. Returns what is to be logged.

        Raises: UserError where loss or gradients are not finite.
        """
        (lr,) = self.schedule.get_last_lr()
        value, batches, numbers = step_gradients(self.loss, self.config, step, self.scaler.scale)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm, foreach=True).item()
        overflow = not math.isfinite(norm) and self.scaler.get_scale() > 1  # of the scaled loss: the step is left out
        if not math.isfinite(value) or not (math.isfinite(norm) or overflow):
            raise UserError(_not_finite(self.stage.name, step, value, norm, batches))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with (
            warnings.catch_warnings()
        ):  # of a first step that was left out, after which the schedule goes on all the same
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        # Shared gradients stay where they are shared from, so that there is no second copy of them.
        self.optimizer.zero_grad(set_to_none=rank_and_world_size()[1] == 1)
        self.average.update_parameters(self.parameters)
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        return {"loss": value, "lr": lr, "grad_norm": norm, **scale, **numbers}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages stand for the parameters inside."""
        own = [p.data for p in self.parameters]
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data = average.data
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data


def train(
    stage: Stage,
    config: LoopConfig,
    folder: Path,
    *,
    log: Callable[[str], None] = print,
    sampler: Sampler | None = None,
    stage_config: Any = None,
) -> None:
    """Train `stage` to `config.steps`, going on from `folder`/state.pt where there is one; then export the EMA weights.

    stage_config: the dataclass that the stage was made from; in the same folder it has to stay the same.

    Raises UserError where the folder holds a run of another configuration, and when loss or gradients are not finite
    (the last checkpoint and the one before it stay, and their weights are finite).
    """
    rank, processes = rank_and_world_size()
    if config.micro_batches % processes:
        raise UserError(
            f"got {processes} processes for micro_batches={config.micro_batches}, expected a divisor of it: "
            "start fewer processes or change micro_batches"
        )
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(stage, config)
    state = RunState(folder, stage_config, trainer)
    start = state.resume(log)
    trainer.start_at(start)
    if start == config.steps:
        log(f"{stage.name}: all {start} steps are done already; with more, it goes on from there")
    record = Record(folder, stage.name, config, start, log) if rank == 0 else None
    with closing(record) if record else nullcontext():
        for step in range(start, config.steps):
            numbers, done = trainer.step(step), step + 1
            if record is None:
                continue
            record(done, numbers)
            if done % config.checkpoint_every == 0 or done == config.steps:
                state.save(done)
            if sampler and done % sampler.every == 0:
                with trainer.averaged():
                    sampler(folder / "samples", done)
    for parameter, average in zip(trainer.parameters, trainer.averages, strict=True):
        parameter.data.copy_(average.data)
    with first_process_first():
        if rank == 0:
            stage.export(folder, {"training": json.dumps({"stage": stage.name, **asdict(config)})})


def _not_finite(stage: str, step: int, value: float, norm: float, batches: list[Batch]) -> str:
    """The same message in every process."""
    found = gathered([(bool(loss.isfinite()), names) for loss, names in batches])
    of_all = [batch for process in found for batch in process]
    bad = [name for finite, names in of_all if not finite for name in names]
    seen = bad or [name for _, names in of_all for name in names]
    where = f" (the batch: {', '.join(seen)})" if seen else ""
    got = f"loss {value:g}" if not math.isfinite(value) else f"gradients of norm {norm:g}"
    return (
        f"got {got} at step {step} of {stage}{where}, expected a finite number: leave out what is broken, or lower "
        "learning_rate, and run again, which goes on from the last checkpoint; delete state.pt for the one before it"
    )
