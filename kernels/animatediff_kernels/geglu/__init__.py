"""The gate of the transformers' feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.calibration import Kernels
from animatediff_kernels.dispatch import Call, run
from animatediff_kernels.geglu.op import geglu_op
from animatediff_kernels.geglu.reference import geglu_reference


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
    return run(call, backend, KERNELS, (x,))


def _torch(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    gate = F.gelu(gate)
    return value * gate if gate.requires_grad else gate.mul_(value)


KERNELS = Kernels(
    triton=lambda x: geglu_op(x),
    torch=_torch,
    reference=geglu_reference,
    tail=lambda inputs, options: ([x[-1:] for x in inputs], slice(-1, None)),
)
