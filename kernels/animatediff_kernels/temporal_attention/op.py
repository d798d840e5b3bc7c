"""Temporal attention as a torch operator, so that compilers, exporters and autograd take it whole."""

import torch
from torch import Tensor

from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.temporal_attention.reference import temporal_attention_reference


def _ready(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the kernels read them: of one stride, channels side by side."""
    if q.stride(2) == 1 and q.stride() == k.stride() == v.stride():
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    from animatediff_kernels.temporal_attention.triton_fwd import forward

    return forward(*_ready(q, k, v), frames, num_heads)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    from animatediff_kernels.temporal_attention.triton_bwd import backward

    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    backward(*_ready(q, k, v), dout.contiguous(), dq, dk, dv, frames, num_heads)
    return dq, dk, dv


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("animatediff::temporal_attention", mutates_args=(), device_types="cpu")
def temporal_attention_op(q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int) -> Tensor:
    if interpreting():
        return _forward(q, k, v, frames, num_heads)
    return temporal_attention_reference(q, k, v, frames, num_heads)


@torch.library.custom_op("animatediff::temporal_attention_backward", mutates_args=(), device_types="cpu")
def temporal_attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if interpreting():
        return _backward(dout, q, k, v, frames, num_heads)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = temporal_attention_reference(*leaves, frames, num_heads)
    dq, dk, dv = (g.contiguous() for g in torch.autograd.grad(out, leaves, dout))
    return dq, dk, dv


temporal_attention_op.register_kernel("cuda")(_forward)
temporal_attention_backward_op.register_kernel("cuda")(_backward)


@temporal_attention_op.register_fake
def _(q, k, v, frames, num_heads):
    return q.new_empty(q.shape)


@temporal_attention_backward_op.register_fake
def _(dout, q, k, v, frames, num_heads):
    return _empty(q), _empty(k), _empty(v)


def _save(ctx, inputs, output):
    *qkv, ctx.frames, ctx.num_heads = inputs
    ctx.save_for_backward(*qkv)


def _grad(ctx, dout):
    return *temporal_attention_backward_op(dout, *ctx.saved_tensors, ctx.frames, ctx.num_heads), None, None


temporal_attention_op.register_autograd(_grad, setup_context=_save)
