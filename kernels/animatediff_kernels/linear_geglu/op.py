"""The linear layer with GEGLU as a torch operator, so that compilers, exporters and autograd take it whole."""

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.geglu.op import geglu_backward_op
from animatediff_kernels.linear_geglu.reference import linear_geglu_reference


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from animatediff_kernels.linear_geglu.triton_fwd import forward

    y, rows = _empty(x, weight), x.flatten(0, -2)
    forward(
        rows if rows.stride(1) == 1 else rows.contiguous(), weight.contiguous(), bias.contiguous(), y.flatten(0, -2)
    )
    return y


@torch.library.custom_op("animatediff::linear_geglu", mutates_args=(), device_types="cpu")
def linear_geglu_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _forward(x, weight, bias) if interpreting() else linear_geglu_reference(x, weight, bias).contiguous()


linear_geglu_op.register_kernel("cuda")(_forward)


@linear_geglu_op.register_fake
def _(x, weight, bias):
    return _empty(x, weight)


def _grad(ctx, dy):
    """The wide tensor was not kept: one more product computes it again, the others are torch's."""
    x, weight, bias = ctx.saved_tensors
    wide = geglu_backward_op(dy, F.linear(x, weight, bias))
    need_x, need_weight, need_bias = ctx.needs_input_grad
    rows = wide.flatten(0, -2)
    return (
        wide @ weight if need_x else None,
        rows.mT @ x.flatten(0, -2) if need_weight else None,
        rows.sum(0) if need_bias else None,
    )


linear_geglu_op.register_autograd(_grad, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
