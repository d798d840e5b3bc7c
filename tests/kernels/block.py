"""A small network that calls every operator that has gradients, and one step of it in one of two processes."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from animatediff_kernels import (
    attention,
    geglu,
    group_norm_silu,
    layer_norm,
    linear_geglu,
    temporal_attention,
    use_backend,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FRAMES, HEADS, WIDTH = 2, 2, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code = nn.Parameter(torch.randn(FRAMES, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.GroupNorm(2, WIDTH)
        self.qkv, self.gated = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: ((b frames), s, width), the same shape out."""
        qkv = self.qkv(layer_norm(x, self.norm1.weight, self.norm1.bias, code=self.code))
        x = x + temporal_attention(*qkv.chunk(3, -1), frames=FRAMES, num_heads=HEADS)
        x = x + attention(*self.qkv(x).chunk(3, -1), num_heads=HEADS)
        image = x.mT[..., None]
        shift = x[::FRAMES, 0]  # of a row per clip
        image = group_norm_silu(image, 2, self.norm2.weight, self.norm2.bias, eps=1e-5, frames=FRAMES, shift=shift)
        return x + geglu(linear_geglu(image[..., 0].mT, self.gated.weight, self.gated.bias))


def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the mean square of the output, by every parameter, on Triton."""
    with use_backend("triton"):
        block(x).square().mean().backward()
    return [p.grad for p in block.parameters()]


def half_of_the_gradients(rank: int, folder: Path) -> None:
    """The whole of one of two processes: `gradients` of half of the clips in folder/x.pt, into a file named by rank.

    It ends without Python's own end: a DistributedDataParallel never lets go of gloo's threads, and one that still
    holds a tensor then takes the process down.
    """
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=1)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=2, timeout=patience)
    block, x = DistributedDataParallel(Block()), torch.load(folder / "x.pt").chunk(2)[rank]
    torch.save(gradients(block, x), folder / f"{rank}.pt")
    os._exit(0)
