"""Does DistributedDataParallel add up gradients in the same order in a process's first step and in a later one?

`PYTHONPATH=.:kernels torchrun --nproc_per_node 4 -m tests.training.bucket_order` prints how far apart they are.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def gradients(first: int, last: int, *, find_unused_parameters: bool) -> list[torch.Tensor]:
    """Of step `last` - 1, by a process that begins with step `first`; nothing is trained."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(400, 400) for _ in range(6)])
    if find_unused_parameters:
        net[0].unused = nn.Parameter(torch.zeros(()))  # or it warns that there is none
    shared = DistributedDataParallel(net, find_unused_parameters=find_unused_parameters)
    for step in range(first, last):
        net.zero_grad()
        x = torch.randn(8, 400, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
        shared(x).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def main() -> None:
    dist.init_process_group("gloo")
    for find in (False, True):
        runs = [gradients(first, 3, find_unused_parameters=find) for first in (0, 2)]
        worst = max((a - b).abs().max().item() for a, b in zip(*runs, strict=True))
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes, find_unused_parameters={find}: {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
