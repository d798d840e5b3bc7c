"""The training loop: optimizer, schedule, averaging, log, checkpoints. What is trained is a `Stage`'s business.

Randomness is a function of (seed, step), never of how a run got there, so a run that was killed and repeated goes on to
the same weights. A step averages `micro_batches` losses; the processes of `torchrun` share them out, so their number
changes the pace and not the result.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from animatediff.training.record import Record
from animatediff.training.run_state import RunState
from animatediff.utils import UserError


@dataclass(frozen=True)
class LoopConfig:
    steps: int
    batch_size: int  # samples of one micro-batch
    learning_rate: float
    micro_batches: int = 1  # averaged in one step
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    tensorboard: bool = False  # scalars for TensorBoard too, in output_dir/tensorboard

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "micro_batches", "log_every", "checkpoint_every"):
            self._require(key, getattr(self, key) >= 1, "at least 1")
        for key in ("learning_rate", "max_grad_norm"):
            self._require(key, getattr(self, key) > 0, "more than 0")
        for key in ("warmup_steps", "weight_decay"):
            self._require(key, getattr(self, key) >= 0, "0 or more")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "0 (no average) to less than 1")
        self._require("seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1")

    def _require(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{key}: got {getattr(self, key)}, expected {expected}")


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


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then the same for ever, or a cosine down to a hundredth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed((seed << 32) + index)


def world() -> tuple[int, int]:
    """Number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process does inside is done before the others begin: to write a file that they read."""
    rank, processes = world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and processes > 1:
        dist.barrier()


def sum_over_processes(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum gradients and loss, in one flat message. Returns the summed loss."""
    if world()[1] == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([*(p.grad.reshape(-1) for p in parameters), loss.reshape(1)])
    dist.all_reduce(flat)
    *parts, total = flat.split([*(p.numel() for p in parameters), 1])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad.copy_(part.view(parameter.shape))
    return total


def step_gradients(
    stage: Stage,
    parameters: list[nn.Parameter],
    config: LoopConfig,
    step: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[float, list[Batch], dict[str, float]]:
    """Give `parameters` the gradients of a step, averaged over the micro-batches of all processes.

    Returns the average loss, this process's batches, and the stage's numbers of the last.
    """
    rank, processes = world()
    batches, numbers = [], {}
    for micro in range(rank, config.micro_batches, processes):
        index = step * config.micro_batches + micro
        loss, numbers = stage.loss(index, config.batch_size, batch_generator(config.seed, index))
        loss = loss / config.micro_batches
        scale(loss).backward()
        batches.append((loss.detach(), stage.names()))
    return sum_over_processes(parameters, sum(loss for loss, _ in batches)).item(), batches, numbers


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
    rank, processes = world()
    if config.micro_batches % processes:
        raise UserError(
            f"got {processes} processes for micro_batches={config.micro_batches}, expected a divisor of it: "
            "start fewer processes or change micro_batches"
        )
    folder.mkdir(parents=True, exist_ok=True)
    named = [(n, p) for n, p in stage.modules().named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, foreach=True
    )
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=stage.scale_loss)
    ema = [p.detach().clone() for p in parameters]
    state = RunState(folder, config, stage_config, named, ema, optimizer, scaler)
    start = state.resume(log)
    record = Record(folder, stage.name, config, start, log) if rank == 0 else None
    with closing(record) if record else nullcontext():
        for step in range(start, config.steps):
            lr = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            value, batches, numbers = step_gradients(stage, parameters, config, step, scaler.scale)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=True).item()
            overflow = not math.isfinite(norm) and scaler.get_scale() > 1  # of the scaled loss: the step is left out
            if not math.isfinite(value) or not (math.isfinite(norm) or overflow):
                raise UserError(_not_finite(stage.name, step, value, norm, batches))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
            done = step + 1
            if record is None:
                continue
            scale = {"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}
            record(done, {"loss": value, "lr": lr, "grad_norm": norm}, scale | numbers)
            if done % config.checkpoint_every == 0 or done == config.steps:
                state.save(done)
            if sampler and done % sampler.every == 0:
                with averaged(parameters, ema):
                    sampler(folder / "samples", done)
    for parameter, average in zip(parameters, ema, strict=True):
        parameter.data.copy_(average)
    if rank == 0:
        stage.export(folder, {"training": json.dumps({"stage": stage.name, **asdict(config)})})
    if processes > 1:
        dist.barrier()


@contextmanager
def averaged(parameters: list[nn.Parameter], ema: list[Tensor]) -> Iterator[None]:
    """The averages stand for the parameters inside."""
    own = [p.data for p in parameters]
    for parameter, average in zip(parameters, ema, strict=True):
        parameter.data = average
    try:
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


def _not_finite(stage: str, step: int, value: float, norm: float, batches: list[Batch]) -> str:
    """The same message in every process."""
    found = [(bool(loss.isfinite()), names) for loss, names in batches]
    everywhere = [found] * world()[1]
    if len(everywhere) > 1:
        dist.all_gather_object(everywhere, found)
    of_all = [batch for process in everywhere for batch in process]
    bad = [name for finite, names in of_all if not finite for name in names]
    seen = bad or [name for _, names in of_all for name in names]
    where = f" (the batch: {', '.join(seen)})" if seen else ""
    got = f"loss {value:g}" if not math.isfinite(value) else f"gradients of norm {norm:g}"
    return (
        f"got {got} at step {step} of {stage}{where}, expected a finite number: leave out what is broken, or lower "
        "learning_rate, and run again, which goes on from the last checkpoint; delete state.pt for the one before it"
    )
