"""GroupNorm and SiLU: the backward kernels.

With n = (x + shift - mean) rstd, z = n w + b, y = silu(z) and dz = dy silu'(z), the mean taken over a group:
dx = rstd (dz w - mean(dz w) - n mean(dz w n)), dw = sum dz n, db = sum dz.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.group_norm_silu.triton_fwd import shift_arguments, token_and_channel_block
from animatediff_kernels.launch import blocks


@triton.jit
def backward_kernel(
    x,
    dy,
    weight,
    bias,
    shift,
    mean,
    rstd,
    sums,  # of dz and of dz n over a chunk, (images, chunks, channels) each: written, or
    sums_normalised,
    mean_grad,  # the means of dz w and of dz w n over a group: read, for
    mean_grad_normalised,
    dx,
    image_stride,
    channel_stride,
    token_stride,
    grad_channel_stride,  # of dy and dx
    grad_token_stride,
    tokens,
    frames,
    images_per_shift,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SHIFT: tl.constexpr,  # whether there is one
    SILU: tl.constexpr,
    SUMS: tl.constexpr,  # whether to write the sums, or else dx
    TOKEN_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    channel_blocks: tl.constexpr = (CHANNELS + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK
    chunks = (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK
    channel = pid % channel_blocks * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    chunk = pid // channel_blocks % chunks
    token = (chunk * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK))[:, None]
    image = (pid // channel_blocks // chunks).to(tl.int64)
    there = channel < CHANNELS
    valid = (token < tokens) & there[None, :]
    group = image // frames * (CHANNELS // PER_GROUP) + channel // PER_GROUP
    scale = tl.load(rstd + group, mask=there, other=0.0)[None, :]
    middle = tl.load(mean + group, mask=there, other=0.0)
    if SHIFT:
        own = tl.load(shift + image // images_per_shift * CHANNELS + channel, mask=there, other=0.0)
        middle -= own.to(tl.float32)
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    far = channel.to(tl.int64)[None, :]  # an image may have more than 2^31 numbers
    at = image * image_stride + token.to(tl.int64) * token_stride + far * channel_stride
    normalised = (tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - middle[None, :]) * scale
    grad_at = image * tokens * CHANNELS + token.to(tl.int64) * grad_token_stride + far * grad_channel_stride
    dz = tl.load(dy + grad_at, mask=valid, other=0.0).to(tl.float32)
    if SILU:
        z = normalised * w + tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[None, :]
        gate = 1.0 / (1.0 + tl.exp(-z))
        dz = dz * gate * (1.0 + z * (1.0 - gate))
    if SUMS:
        at = (image * chunks + chunk) * CHANNELS + channel
        tl.store(sums + at, tl.sum(dz, 0), mask=there)
        tl.store(sums_normalised + at, tl.sum(dz * normalised, 0), mask=there)
    else:
        direct = tl.load(mean_grad + group, mask=there, other=0.0)[None, :]
        through = tl.load(mean_grad_normalised + group, mask=there, other=0.0)[None, :]
        result = scale * (dz * w - direct - normalised * through)
        tl.store(dx + grad_at, result.to(dx.dtype.element_ty), mask=valid)


def backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    frames: int,
    silu: bool,
    dx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dx (n, c, tokens), dense and of dy's strides; return the gradients of weight and bias, (c,) float32."""
    n, channels, tokens = x.shape
    groups, tile = mean.shape[1], token_and_channel_block(x, channels, tokens)
    chunks = blocks(tokens, tile["TOKEN_BLOCK"])
    programs = n * chunks * blocks(channels, tile["CHANNEL_BLOCK"])
    sums = x.new_empty(2, n, chunks, channels, dtype=torch.float32)
    shift, shared, has_shift = shift_arguments(x, shift)
    sizes = {"CHANNELS": channels, "PER_GROUP": channels // groups, "SHIFT": has_shift, "SILU": silu, **tile}
    strides = (*x.stride(), dx.stride(1), dx.stride(2))

    def run(mean_grad: Tensor, mean_grad_normalised: Tensor, write_sums: bool) -> None:
        statistics = (mean, rstd, sums[0], sums[1], mean_grad, mean_grad_normalised)
        args = (x, dy, weight, bias, shift, *statistics, dx, *strides, tokens, frames, shared)
        launch.run(backward_kernel, programs, *args, SUMS=write_sums, **sizes)

    run(mean, mean, True)  # the means of the gradient are not read yet
    per_image = sums.sum(2)
    weighted = (per_image * weight.float()).reshape(2, n // frames, frames, groups, -1).sum((2, 4))
    run(*(weighted / (frames * tokens * channels // groups)), False)
    return per_image[1].sum(0), per_image[0].sum(0)
