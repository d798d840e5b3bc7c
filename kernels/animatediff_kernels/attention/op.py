"""Attention as a torch operator, so that compilers, exporters and autograd take it whole."""

import torch
from torch import Tensor

from animatediff_kernels.attention.reference import attention_reference, log_normaliser_reference
from animatediff_kernels.dispatch import interpreting


def _ready(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the kernels read them: channels side by side, k and v of one stride."""
    q = q if q.stride(2) == 1 else q.contiguous()
    if k.stride(2) == 1 and k.stride() == v.stride():
        return q, k, v
    return q, k.contiguous(), v.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    from animatediff_kernels.attention.triton_fwd import forward

    return forward(*_ready(q, k, v), num_heads)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, num_heads: int, keys_too: bool
) -> list[Tensor]:
    from animatediff_kernels.attention.triton_bwd import backward

    return backward(*_ready(q, k, v), out, log_sum, dout.contiguous(), num_heads, keys_too)


@torch.library.custom_op("animatediff::attention", mutates_args=(), device_types="cpu")
def attention_op(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    if interpreting():
        return _forward(q, k, v, num_heads)
    return attention_reference(q, k, v, num_heads).contiguous(), log_normaliser_reference(q, k, num_heads)


@torch.library.custom_op(
    "animatediff::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum, SymInt num_heads, bool keys_too)"
    " -> Tensor[]",
)
def attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, num_heads: int, keys_too: bool
) -> list[Tensor]:
    if interpreting():
        return _backward(dout, q, k, v, out, log_sum, num_heads, keys_too)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again = attention_reference(*leaves, num_heads)
    return [g.contiguous() for g in torch.autograd.grad(again, leaves[: 3 if keys_too else 1], dout)]


attention_op.register_kernel("cuda")(_forward)
attention_backward_op.register_kernel("cuda")(_backward)


@attention_op.register_fake
def _(q, k, v, num_heads):
    n, s, width = q.shape
    return q.new_empty(n, s, width), q.new_empty(n, num_heads, s, dtype=torch.float32)


@attention_backward_op.register_fake
def _(dout, q, k, v, out, log_sum, num_heads, keys_too):
    return [x.new_empty(x.shape) for x in ((q, k, v) if keys_too else (q,))]


def _save(ctx, inputs, output):
    *qkv, ctx.num_heads = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx, dout, _):
    """The keys of a frozen text need no gradients: theirs is a kernel of its own."""
    keys_too = any(ctx.needs_input_grad[1:3])
    dq, *others = attention_backward_op(dout, *ctx.saved_tensors, ctx.num_heads, keys_too)
    return dq, *(others or (None, None)), None


attention_op.register_autograd(_grad, setup_context=_save)
