"""The first layer of the transformers' feed-forwards, gate included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.calibration import Kernels
from animatediff_kernels.dispatch import Call, run
from animatediff_kernels.geglu import geglu
from animatediff_kernels.linear_geglu.op import linear_geglu_op
from animatediff_kernels.linear_geglu.reference import linear_geglu_reference


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
    sizes = {"rows": x.numel() // width, "width": width, "inner": wide // 2}
    call = Call.of("linear_geglu", x, weight, bias, dtype=_autocast(x), **sizes)
    return run(call, backend, KERNELS, (x, weight, bias), gate=backend)


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in, where it is on."""
    device = x.device.type
    on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _triton(x: Tensor, weight: Tensor, bias: Tensor, gate: str | None) -> Tensor:
    dtype = _autocast(x) or x.dtype
    return linear_geglu_op(*(t.to(dtype) for t in (x, weight, bias)))


KERNELS = Kernels(
    triton=_triton,
    torch=lambda x, weight, bias, gate: geglu(F.linear(x, weight, bias), backend=gate),
    reference=lambda x, weight, bias, gate: linear_geglu_reference(x, weight, bias),
    tail=lambda inputs, options: ((inputs[0][-1:], *inputs[1:]), slice(-1, None)),
)
