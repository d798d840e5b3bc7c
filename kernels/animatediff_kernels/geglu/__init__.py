"""The gate of the transformers' feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.dispatch import Call, choose
from animatediff_kernels.geglu.op import geglu_op


def geglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """value * gelu(gate), by the exact GELU (Shazeer 2020, arXiv 2002.05202, Eq. 6).

    Args:
        x: (…, 2 * width), the values before the gates.
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: (…, width).
    Raises: ValueError for an odd width, and where "triton" is asked for and cannot be had.
    """
    wide = x.shape[-1]
    if wide % 2:
        raise ValueError(f"got a width of {wide}, expected values and as many gates")
    call = Call.of("geglu", x, rows=x.numel() // wide, width=wide // 2)
    if choose(call, backend).backend == "triton":
        return geglu_op(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate) if call.grad else F.gelu(gate).mul_(value)
