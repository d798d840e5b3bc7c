"""LayerNorm with an encoding of the frame as a torch operator, for compilers, exporters and autograd."""

import torch
from torch import Tensor

from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.layer_norm.reference import layer_norm_reference


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, code: Tensor | None, eps: float) -> Tensor:
    from animatediff_kernels.layer_norm.triton_fwd import forward

    y = _empty(x)
    forward(x.contiguous(), weight.contiguous(), bias.contiguous(), None if code is None else code.contiguous(), eps, y)
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from animatediff_kernels.layer_norm.triton_bwd import backward

    dx = _empty(x)
    dw, db = backward(dy.contiguous(), x.contiguous(), weight.contiguous(), eps, dx)
    return dx, dw.to(weight.dtype), db.to(bias.dtype)


@torch.library.custom_op("animatediff::layer_norm", mutates_args=(), device_types="cpu")
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, code: Tensor | None, eps: float) -> Tensor:
    if interpreting():
        return _forward(x, weight, bias, code, eps)
    return layer_norm_reference(x, weight, bias, code, eps).contiguous()


@torch.library.custom_op("animatediff::layer_norm_backward", mutates_args=(), device_types="cpu")
def layer_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if interpreting():
        return _backward(dy, x, weight, bias, eps)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = layer_norm_reference(*leaves, None, eps)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    return dx.contiguous(), *(g.clone(memory_format=torch.contiguous_format) for g in (dw, db))


layer_norm_op.register_kernel("cuda")(_forward)
layer_norm_backward_op.register_kernel("cuda")(_backward)


@layer_norm_op.register_fake
def _(x, weight, bias, code, eps):
    return _empty(x)


@layer_norm_backward_op.register_fake
def _(dy, x, weight, bias, eps):
    return _empty(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    x, weight, bias, code, ctx.eps = inputs
    ctx.frames = None if code is None else len(code)
    ctx.save_for_backward(x, weight, bias)


def _grad(ctx, dy):
    dx, dw, db = layer_norm_backward_op(dy, *ctx.saved_tensors, ctx.eps)
    code_grad = dy.unflatten(0, (-1, ctx.frames)).sum((0, 2)) if ctx.needs_input_grad[3] else None
    return dx, dw, db, code_grad, None


layer_norm_op.register_autograd(_grad, setup_context=_save)
