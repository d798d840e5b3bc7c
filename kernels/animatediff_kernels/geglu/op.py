"""GEGLU as a torch operator, so that compilers, exporters and autograd take it whole."""

import torch
from torch import Tensor

from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.geglu.reference import geglu_reference


def _forward(x: Tensor) -> Tensor:
    from animatediff_kernels.geglu.triton_kernels import run

    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    run(x.contiguous(), y, y, grad=False)
    return y


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    from animatediff_kernels.geglu.triton_kernels import run

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(x.contiguous(), dy.contiguous(), dx, grad=True)
    return dx


@torch.library.custom_op("animatediff::geglu", mutates_args=(), device_types="cpu")
def geglu_op(x: Tensor) -> Tensor:
    return _forward(x) if interpreting() else geglu_reference(x).contiguous()


@torch.library.custom_op("animatediff::geglu_backward", mutates_args=(), device_types="cpu")
def geglu_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    if interpreting():
        return _backward(dy, x)
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = geglu_reference(leaf)
    return torch.autograd.grad(y, leaf, dy)[0].contiguous()


geglu_op.register_kernel("cuda")(_forward)
geglu_backward_op.register_kernel("cuda")(_backward)


@geglu_op.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@geglu_backward_op.register_fake
def _(dy, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


geglu_op.register_autograd(
    lambda ctx, dy: geglu_backward_op(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
