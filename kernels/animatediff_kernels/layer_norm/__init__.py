"""LayerNorm of tokens, and the encoding of the frame that follows it in a motion module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.calibration import Inputs, Kernels
from animatediff_kernels.dispatch import Call, run
from animatediff_kernels.layer_norm.op import layer_norm_op
from animatediff_kernels.layer_norm.reference import layer_norm_reference


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    code: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Normalise every token (Ba et al. 2016, arXiv 1607.06450), then add to it the code of its frame.

    Args:
        x: ((b frames), s, c). weight, bias: (c,), of any dtype.
        code: (frames, c), of any dtype, or None to add nothing.
        backend: "auto", "torch" or "triton"; None asks `use_backend` and the environment.
    Returns: ((b frames), s, c).
    Raises: ValueError for shapes that do not fit, and where "triton" is asked for and cannot be had.
    """
    n, s, width = x.shape
    if not weight.shape == bias.shape == (width,):
        raise ValueError(f"got weight {(*weight.shape,)} and bias {(*bias.shape,)}, expected ({width},)")
    if code is not None and not (code.shape[1:] == (width,) and n % len(code) == 0):
        raise ValueError(f"got code {(*code.shape,)} for {n} images, expected (a divisor of it, {width})")
    weights = (weight, bias) if code is None else (weight, bias, code)
    call = Call.of("layer_norm", x, weights=weights, rows=n * s, width=width, code=int(code is not None))
    return run(call, backend, KERNELS, (x, weight, bias, code), eps=eps)


def _torch(x: Tensor, weight: Tensor, bias: Tensor, code: Tensor | None, eps: float) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if code is None else (y.unflatten(0, (-1, len(code))) + code[:, None]).flatten(0, 1)


def _tail(inputs: Inputs, options: Mapping[str, Any]) -> tuple[Inputs, Any]:
    """The images of the last clip, or the last image."""
    x, weight, bias, code = inputs
    part = slice(-(1 if code is None else len(code)), None)
    return (x[part], weight, bias, code), part


KERNELS = Kernels(
    triton=lambda x, weight, bias, code, eps: layer_norm_op(x, weight, bias, code, eps),
    torch=_torch,
    reference=layer_norm_reference,
    tail=_tail,
)
