"""The training loop: optimizer, schedule, averaging, log, checkpoints. What is trained is a `Stage`'s business.

Randomness is a function of (seed, step), never of how a run got there, so a run that was killed and repeated goes on to
the same weights. A step averages `micro_batches` losses; the processes of `torchrun` share them out, so their number
changes the pace and not the result.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


MAY_CHANGE = ("log_every", "checkpoint_every", "tensorboard")  # of a run that has begun


class Stage(ABC):
    """What one training stage is."""

    name: str

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


def average_gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum gradients and loss over the processes, in one flat message. Returns the summed loss."""
    if world()[1] == 1:
        return loss
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in grads)])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat[1:].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view(parameter.shape)
    return flat[0]


def train(
    stage: Stage,
    config: LoopConfig,
    folder: Path,
    *,
    log: Callable[[str], None] = print,
    sampler: Sampler | None = None,
) -> None:
    """Train `stage` to `config.steps`, going on from `folder`/state.pt where there is one; then export the EMA weights.

    Raises UserError where the folder holds a run of another configuration, and when loss or gradients are not finite
    (the last checkpoint stays, and its weights are finite).
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
    ema = [p.detach().clone() for p in parameters]
    start = _resume(folder / "state.pt", config, named, ema, optimizer)
    write = scalar_writer(folder, config) if rank == 0 else None
    began, began_step = time.monotonic(), start
    for step in range(start, config.steps):
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, names, numbers = [], [], {}
        for micro in range(rank, config.micro_batches, processes):
            index = step * config.micro_batches + micro
            loss, numbers = stage.loss(index, config.batch_size, batch_generator(config.seed, index))
            (loss / config.micro_batches).backward()
            losses.append(loss.detach())
            names.append(stage.names())
        value = average_gradients(parameters, sum(loss / config.micro_batches for loss in losses)).item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=True).item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise UserError(_not_finite(stage.name, step, value, norm, losses, names))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
        done = step + 1
        if write is None:
            continue
        if done % config.log_every == 0 or done == config.steps:
            pace = (done - began_step) / (time.monotonic() - began)
            write({"step": done, "loss": value, "lr": lr, "grad_norm": norm, "steps_per_s": pace, **numbers})
            left = (config.steps - done) / pace / 60
            log(f"{stage.name} {done}/{config.steps} loss {value:.4f} {pace:.2f} steps/s, {left:.0f} min left")
        if done % config.checkpoint_every == 0 or done == config.steps:
            _save(folder / "state.pt", config, done, named, ema, optimizer)
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


def scalar_writer(folder: Path, config: LoopConfig) -> Callable[[dict[str, Any]], None]:
    """A function that appends numbers to `folder`/log.jsonl and, where asked for, to TensorBoard's files.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """
    board = None
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, because it is an extra
        except ImportError:
            raise UserError(
                'got tensorboard: true, which is not installed: pip install -e ".[tensorboard]", or leave it out '
                "(log.jsonl has the same numbers)"
            ) from None
        board = SummaryWriter(str(folder / "tensorboard"))

    def write(record: dict[str, Any]) -> None:
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps({k: float(f"{v:.5g}") for k, v in record.items()}) + "\n")
        if board:
            for name, value in record.items():
                if name != "step":
                    board.add_scalar(name, value, record["step"])
            board.flush()

    return write


def _not_finite(stage: str, step: int, value: float, norm: float, losses: list[Tensor], names: list[list[str]]) -> str:
    bad = [name for loss, batch in zip(losses, names, strict=True) if not loss.isfinite() for name in batch]
    seen = bad or [name for batch in names for name in batch]
    where = f" (the batch: {', '.join(seen)})" if seen else ""
    got = f"loss {value:g}" if not math.isfinite(value) else f"gradients of norm {norm:g}"
    return (
        f"got {got} at step {step} of {stage}{where}, expected a finite number; the last checkpoint is kept: lower "
        "learning_rate, or leave out what is broken, and run again"
    )


def _save(path: Path, config: LoopConfig, step: int, named, ema: list[Tensor], optimizer) -> None:
    state = {
        "config": asdict(config),
        "step": step,
        "model": {n: p.detach() for n, p in named},
        "ema": {n: e for (n, _), e in zip(named, ema, strict=True)},
        "optimizer": optimizer.state_dict(),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _resume(path: Path, config: LoopConfig, named, ema: list[Tensor], optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    began = asdict(LoopConfig(steps=0, batch_size=0, learning_rate=0.0)) | state["config"]
    for key, value in asdict(config).items():
        if key not in MAY_CHANGE and began[key] != value:
            raise UserError(
                f"got {key}={value} for the run in {path.parent}, expected {began[key]} as it began; "
                "keep the configuration or choose another output folder"
            )
    sizes = [{n: t.shape for n, t in tensors} for tensors in (named, state["model"].items())]
    if sizes[0] != sizes[1]:
        other = min(n for n in sizes[0].keys() | sizes[1].keys() if sizes[0].get(n) != sizes[1].get(n))
        raise UserError(
            f"got {other} of shape {_shape(sizes[0], other)} for the run in {path.parent}, expected "
            f"{_shape(sizes[1], other)} as it began; keep the configuration or choose another output folder"
        )
    for (name, parameter), average in zip(named, ema, strict=True):
        parameter.data.copy_(state["model"][name])
        average.copy_(state["ema"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _shape(sizes: dict[str, torch.Size], name: str) -> object:
    return tuple(sizes[name]) if name in sizes else "none"
