"""Temporal attention as a torch operator, so that compilers, exporters and autograd take it whole.

`qkv` is either [q, k, v] or the one packed tensor [(…, 3 * width)] of a joint projection; gradients come back in the
same form.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff_kernels.dispatch import interpreting
from animatediff_kernels.temporal_attention.reference import temporal_attention_reference


def parts(qkv: Sequence[Tensor]) -> list[Tensor]:
    """q, k and v without copies."""
    return list(qkv[0].chunk(3, dim=-1)) if len(qkv) == 1 else list(qkv)


def _ready(qkv: Sequence[Tensor]) -> list[Tensor]:
    """q, k and v as the kernels read them: of one stride, channels side by side."""
    q, k, v = parts(qkv)
    if q.stride(2) == 1 and q.stride() == k.stride() == v.stride():
        return [q, k, v]
    return [q.contiguous(), k.contiguous(), v.contiguous()]


def _forward(qkv: Sequence[Tensor], frames: int, num_heads: int) -> Tensor:
    from animatediff_kernels.temporal_attention.triton_fwd import forward

    return forward(*_ready(qkv), frames, num_heads)


def _backward(dout: Tensor, qkv: Sequence[Tensor], frames: int, num_heads: int) -> list[Tensor]:
    from animatediff_kernels.temporal_attention.triton_bwd import backward

    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]
    backward(*_ready(qkv), dout.contiguous(), *parts(grads), frames, num_heads)
    return grads


@torch.library.custom_op(
    "animatediff::temporal_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor[] qkv, SymInt frames, SymInt num_heads) -> Tensor",
)
def temporal_attention_op(qkv: Sequence[Tensor], frames: int, num_heads: int) -> Tensor:
    if interpreting():
        return _forward(qkv, frames, num_heads)
    return temporal_attention_reference(*parts(qkv), frames, num_heads)


@torch.library.custom_op(
    "animatediff::temporal_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dout, Tensor[] qkv, SymInt frames, SymInt num_heads) -> Tensor[]",
)
def temporal_attention_backward_op(dout: Tensor, qkv: Sequence[Tensor], frames: int, num_heads: int) -> list[Tensor]:
    if interpreting():
        return _backward(dout, qkv, frames, num_heads)
    leaves = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = temporal_attention_reference(*parts(leaves), frames, num_heads)
    return [g.contiguous() for g in torch.autograd.grad(out, leaves, dout)]


temporal_attention_op.register_kernel("cuda")(_forward)
temporal_attention_backward_op.register_kernel("cuda")(_backward)


@temporal_attention_op.register_fake
def _(qkv, frames, num_heads):
    q = parts(qkv)[0]
    return q.new_empty(q.shape)


@temporal_attention_backward_op.register_fake
def _(dout, qkv, frames, num_heads):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]


def _save(ctx, inputs, output):
    qkv, ctx.frames, ctx.num_heads = inputs
    ctx.save_for_backward(*qkv)


def _grad(ctx, dout):
    return temporal_attention_backward_op(dout, list(ctx.saved_tensors), ctx.frames, ctx.num_heads), None, None


temporal_attention_op.register_autograd(_grad, setup_context=_save)
