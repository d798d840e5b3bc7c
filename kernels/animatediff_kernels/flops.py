"""FLOP formulas of the operators that multiply matrices, registered with torch.utils.flop_counter by importing this.

It is a module of its own because torch's counter imports triton. As torch does for its own attention, only the matrix
products are counted, at the true sizes: of attention two forward and five backward.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula


def product(queries: int, keys: int, width: int, rows: int) -> int:
    """Of one (queries x width) by (width x keys) product for each of `rows`, over all heads at once."""
    return 2 * rows * queries * keys * width


def temporal(q, frames: int) -> int:
    n, s, width = q
    return product(frames, frames, width, n // frames * s)


@register_flop_formula(torch.ops.animatediff.temporal_attention)
def temporal_attention_flops(q, k, v, frames, num_heads, *args, out_shape=None, **kwargs) -> int:
    return 2 * temporal(q, frames)


@register_flop_formula(torch.ops.animatediff.temporal_attention_backward)
def temporal_attention_backward_flops(dout, q, k, v, frames, num_heads, *args, out_shape=None, **kwargs) -> int:
    return 5 * temporal(q, frames)


@register_flop_formula(torch.ops.animatediff.attention)
def attention_flops(q, k, v, num_heads, *args, out_shape=None, **kwargs) -> int:
    return 2 * product(q[1], k[1], q[2], q[0])


@register_flop_formula(torch.ops.animatediff.attention_backward)
def attention_backward_flops(dout, q, k, v, out, log_sum, num_heads, keys_too, out_shape=None, **kwargs) -> int:
    return (5 if keys_too else 3) * product(q[1], k[1], q[2], q[0])


@register_flop_formula(torch.ops.animatediff.linear_geglu)
def linear_geglu_flops(x, weight, bias, *args, out_shape=None, **kwargs) -> int:
    return product(math.prod(x[:-1]), *weight, 1)
