"""Calls of every launching function at layers of the SD-1.5-sized network, on tensors whose contents do not matter."""

from collections.abc import Callable

import torch
from animatediff_kernels.attention import op as attention
from animatediff_kernels.geglu import op as geglu
from animatediff_kernels.group_norm_silu import op as group_norm_silu
from animatediff_kernels.layer_norm import op as layer_norm
from animatediff_kernels.linear_geglu import op as linear_geglu
from animatediff_kernels.temporal_attention import op as temporal_attention

HEADS = 8
TOKENS = {40: 4096, 80: 1024, 160: 256}  # of each head width, at 512 x 512


def temporal(dim: int, frames: int, dtype: torch.dtype) -> list[Callable]:
    q, k, v = torch.empty(frames, 64, 3 * HEADS * dim, dtype=dtype).chunk(3, -1)
    dout = torch.empty(frames, 64, HEADS * dim, dtype=dtype)
    return [
        lambda: temporal_attention._forward(q, k, v, frames, HEADS),
        lambda: temporal_attention._backward(dout, q, k, v, frames, HEADS),
    ]


def spatial(dim: int, tokens: int, dtype: torch.dtype) -> list[Callable]:
    q = torch.empty(1, tokens, HEADS * dim, dtype=dtype)
    packed = torch.empty(1, tokens, 3 * HEADS * dim, dtype=dtype).chunk(3, -1)
    return [
        lambda: attention._forward(*packed, HEADS),
        lambda: attention._backward(q, *packed, q, torch.empty(1, HEADS, tokens), HEADS, True),
    ]


def text(dim: int, keys: int, dtype: torch.dtype) -> list[Callable]:
    q, k = torch.empty(2, 256, HEADS * dim, dtype=dtype), torch.empty(1, keys, HEADS * dim, dtype=dtype)
    return [
        lambda: attention._forward(q, k, k, HEADS),
        lambda: attention._backward(q, q, k, k, q, torch.empty(2, HEADS, 256), HEADS, True),
    ]


def gated(width: int, dtype: torch.dtype) -> list[Callable]:
    x, weight = torch.empty(4096, width, dtype=dtype), torch.empty(8 * width, width, dtype=dtype)
    return [lambda: linear_geglu._forward(x, weight, weight[:, 0])]


def others(dtype: torch.dtype) -> list[Callable]:
    x = torch.empty(2, 320, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
    rows, wide = torch.empty(2, 4096, 320, dtype=dtype), torch.empty(2, 256, 2 * 1280, dtype=dtype)
    weight, code, statistics = torch.empty(320, dtype=dtype), torch.empty(2, 320, dtype=dtype), torch.empty(1, 32)
    return [
        lambda: group_norm_silu._forward(x, 32, weight, weight, code, 1e-5, 2, True),
        lambda: group_norm_silu._backward(x, x, weight, weight, code, statistics, statistics, 2, True),
        lambda: layer_norm._forward(rows, weight, weight, code, 1e-5),
        lambda: layer_norm._backward(rows, rows, weight, weight, 1e-5),
        lambda: geglu._forward(wide),
        lambda: geglu._backward(wide[..., :1280], wide),
    ]


def one_group(channels: int, dtype: torch.dtype) -> list[Callable]:
    x = torch.empty(32, channels, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    return [lambda: group_norm_silu._forward(x, 1, x[0, :, 0, 0], x[0, :, 0, 0], None, 1e-5, 16, True)]


CASES = {"others": others(torch.bfloat16), "one-group": one_group(2560, torch.bfloat16)}
for dim, tokens in TOKENS.items():  # no multiples of a tile
    CASES[f"attention-{dim}-masked-float16"] = spatial(dim, tokens - 1, torch.float16)
    CASES[f"temporal13-{dim}-masked-float16"] = temporal(dim, 13, torch.float16)
for dtype in (torch.bfloat16, torch.float32):
    for dim in TOKENS:
        key = f"{dim}-{str(dtype)[6:]}"
        CASES[f"gated-{key}"] = gated(HEADS * dim, dtype)
        CASES[f"attention-{key}"] = spatial(dim, TOKENS[dim], dtype)
        CASES |= {f"text{keys}-{key}": text(dim, keys, dtype) for keys in (77, 154)}
        CASES |= {f"temporal{frames}-{key}": temporal(dim, frames, dtype) for frames in (16, 32)}
    CASES |= {f"temporal64-{dim}-bfloat16": temporal(dim, 64, torch.bfloat16) for dim in TOKENS}
