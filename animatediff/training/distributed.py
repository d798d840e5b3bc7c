"""Several processes that train together: who is who, and gradients that do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process does inside is done before the others begin: to write a file that they read."""
    rank, processes = rank_and_world_size()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and processes > 1:
        dist.barrier()


class StepLoss(nn.Module):
    """A stage's loss as the forward pass of a module, whose parameters are those that are trained."""

    def __init__(self, stage: Any, parameters: nn.ParameterList):
        super().__init__()
        self.stage, self.trainable = stage, parameters

    def forward(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return self.stage.loss(index, batch_size, generator)


def shared_loss(stage: Any, parameters: nn.ParameterList) -> nn.Module:
    """A `StepLoss`; in a group of processes, backward passes average its gradients over all of them."""
    loss = StepLoss(stage, parameters)
    if rank_and_world_size()[1] == 1:
        return loss
    # DistributedDataParallel orders its buckets anew after a process's first step, unless it looks for unused
    # parameters. In other buckets three or more processes add up in another order, and a run that goes on would part
    # from one that was never stopped (docs/training.md). It warns at every start where it finds none: here is one.
    loss.unused = nn.Parameter(torch.zeros((), device=parameters[0].device))
    return DistributedDataParallel(loss, find_unused_parameters=True, gradient_as_bucket_view=True)


def without_sharing(loss: nn.Module) -> AbstractContextManager:
    """Inside, gradients add up in each process for itself."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()


def mean_over_processes(value: Tensor) -> Tensor:
    processes = rank_and_world_size()[1]
    if processes > 1:
        dist.all_reduce(value)
    return value / processes


def gathered(found: Any) -> list[Any]:
    """What each process has found, in the order of their numbers."""
    everywhere = [found] * rank_and_world_size()[1]
    if len(everywhere) > 1:
        dist.all_gather_object(everywhere, found)
    return everywhere
