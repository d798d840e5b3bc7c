"""The first layer of the transformers' feed-forwards, gate included."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.dispatch import Call, choose
from animatediff_kernels.geglu import geglu
from animatediff_kernels.linear_geglu.op import linear_geglu_op


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """value * gelu(gate) of [value | gate] = x weightᵀ + bias (Shazeer 2020, arXiv 2002.05202, Eq. 6).

    Where Triton is not chosen it is torch's linear layer and then `geglu`, which chooses for itself. Under autocast
    Triton computes in autocast's dtype, as torch's linear layer does.

    Args:
        x: (…, width). weight: (2 * inner, width), the rows of the values before those of the gates. bias: (2 * inner,).
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: (…, inner).
    Raises: ValueError for shapes that do not fit, and where "triton" is asked for and cannot be had.
    """
    wide, width = weight.shape
    if not (wide % 2 == 0 and x.shape[-1] == width and bias.shape == (wide,)):
        raise ValueError(
            f"got x {(*x.shape,)}, weight {(*weight.shape,)}, bias {(*bias.shape,)}, expected (…, w), (2 i, w), (2 i,)"
        )
    call = Call.of("linear_geglu", x, weight, bias, rows=x.numel() // width, width=width, inner=wide // 2)
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        call = replace(call, dtype=torch.get_autocast_dtype(device))
    if choose(call, backend).backend == "triton":
        assert call.dtype is not None  # that is refused
        return linear_geglu_op(*(t.to(call.dtype) for t in (x, weight, bias)))
    return geglu(F.linear(x, weight, bias), backend=backend)
