"""GroupNorm and SiLU as a torch operator, so that compilers, exporters and autograd take it whole."""

import torch
from torch import Tensor

from animatediff_kernels.cpu import layout_of
from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.group_norm_silu.reference import group_norm_silu_reference, shifted


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


def _forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float, frames: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from animatediff_kernels.group_norm_silu.triton_fwd import forward

    y = _dense_like(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    mean, rstd = forward(x.flatten(2), num_groups, weight, bias, shift, eps, frames, silu, y.flatten(2))
    return y, mean, rstd


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    frames: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from animatediff_kernels.group_norm_silu.triton_bwd import backward

    dx = _dense_like(x)
    dy = dy.contiguous(memory_format=layout_of(x))
    weight, bias = weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    dw, db = backward(x.flatten(2), dy.flatten(2), weight, bias, shift, mean, rstd, frames, silu, dx.flatten(2))
    return dx, dw.to(weight.dtype), db.to(bias.dtype)


@torch.library.custom_op("animatediff::group_norm_silu", mutates_args=(), device_types="cpu")
def group_norm_silu_op(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float, frames: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if interpreting():
        return _forward(x, num_groups, weight, bias, shift, eps, frames, silu)
    y = _dense_like(x).copy_(group_norm_silu_reference(x, num_groups, weight, bias, shift, eps, frames, silu))
    groups = shifted(x, shift).float().reshape(x.shape[0] // frames, frames, num_groups, -1)
    return y, groups.mean((1, 3)), (groups.var((1, 3), unbiased=False) + eps).rsqrt()


@torch.library.custom_op("animatediff::group_norm_silu_backward", mutates_args=(), device_types="cpu")
def group_norm_silu_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    frames: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if interpreting():
        return _backward(dy, x, weight, bias, shift, mean, rstd, frames, silu)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = group_norm_silu_reference(leaves[0], mean.shape[1], *leaves[1:], shift, eps, frames, silu)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    return _dense_like(x).copy_(dx), *(g.clone(memory_format=torch.contiguous_format) for g in (dw, db))


group_norm_silu_op.register_kernel("cuda")(_forward)


@group_norm_silu_backward_op.register_kernel("cuda")
def _(dy, x, weight, bias, shift, mean, rstd, eps, frames, silu):
    return _backward(dy, x, weight, bias, shift, mean, rstd, frames, silu)


@group_norm_silu_op.register_fake
def _(x, num_groups, weight, bias, shift, eps, frames, silu):
    statistics = x.new_empty(x.shape[0] // frames, num_groups, dtype=torch.float32)
    return _dense_like(x), statistics, torch.empty_like(statistics)


@group_norm_silu_backward_op.register_fake
def _(dy, x, weight, bias, shift, mean, rstd, eps, frames, silu):
    return _dense_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    x, _, weight, bias, shift, ctx.eps, ctx.frames, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, shift, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad(ctx, dy, *_):
    saved = ctx.saved_tensors
    dx, dw, db = group_norm_silu_backward_op(dy, *saved, ctx.eps, ctx.frames, ctx.silu)
    shift_grad = dx.unflatten(0, (len(saved[3]), -1)).sum((1, 3, 4)) if ctx.needs_input_grad[4] else None
    return dx, None, dw, db, shift_grad, None, None, None


group_norm_silu_op.register_autograd(_grad, setup_context=_save)
