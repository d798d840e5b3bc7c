"""GroupNorm and SiLU: the forward kernels.

Channels of a group are rarely a power of two, so the two kernels that touch the activations work on channels: one
writes mean and squared deviation of every channel over a chunk of tokens, one normalises. A shift of a channel moves
its mean and nothing else. Between them a small kernel
merges the parts of a group by the formula of Chan, Golub and LeVeque (1983, Eq. 2.1), which does not cancel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from animatediff_kernels import launch
from animatediff_kernels.launch import blocks, power_of_2


@triton.jit
def parts_kernel(
    x,
    shift,
    means,
    deviations,
    image_stride,
    channel_stride,
    token_stride,
    tokens,
    images_per_shift,
    CHANNELS: tl.constexpr,
    SHIFT: tl.constexpr,  # whether there is one
    TOKEN_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel over one chunk of tokens, both (images, chunks, channels)."""
    pid = tl.program_id(0)
    channel_blocks: tl.constexpr = (CHANNELS + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK
    chunks = (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK
    channel = pid % channel_blocks * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    chunk = pid // channel_blocks % chunks
    image = (pid // channel_blocks // chunks).to(tl.int64)
    token = chunk * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    valid = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
    rows, columns = token.to(tl.int64) * token_stride, channel.to(tl.int64) * channel_stride  # beyond 2^31 numbers
    at = image * image_stride + rows[:, None] + columns[None, :]
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / tl.minimum(TOKEN_BLOCK, tokens - chunk * TOKEN_BLOCK)
    distance = tl.where(valid, value - mean[None, :], 0.0)
    if SHIFT:
        at = image // images_per_shift * CHANNELS + channel
        mean += tl.load(shift + at, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    at = (image * chunks + chunk) * CHANNELS + channel
    tl.store(means + at, mean, mask=channel < CHANNELS)
    tl.store(deviations + at, tl.sum(distance * distance, 0), mask=channel < CHANNELS)


@triton.jit
def merge_kernel(
    means,
    deviations,
    mean,
    rstd,
    items,
    tokens,
    eps,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,  # of one image
    PARTS: tl.constexpr,  # chunks of all images of one statistic
    TOKEN_BLOCK: tl.constexpr,
    ITEM_BLOCK: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    """Mean and 1 / standard deviation of a few groups: M = sum n_i m_i / N, S = sum S_i + sum n_i (m_i - M)^2."""
    item = tl.program_id(0) * ITEM_BLOCK + tl.arange(0, ITEM_BLOCK)  # a group of an image or clip
    statistic, group = (item // GROUPS).to(tl.int64), item % GROUPS
    channel = tl.arange(0, CHANNEL_BLOCK)[None, None, :]
    at = (statistic * PARTS * GROUPS * PER_GROUP + group * PER_GROUP)[:, None, None] + channel
    there = (item < items)[:, None, None] & (channel < PER_GROUP)
    number = tokens * (PARTS // CHUNKS * PER_GROUP) * 1.0
    weighted = tl.zeros([ITEM_BLOCK, PART_BLOCK, CHANNEL_BLOCK], tl.float32)
    for start in range(0, PARTS, PART_BLOCK):
        part = start + tl.arange(0, PART_BLOCK)[None, :, None]
        valid = (part < PARTS) & there
        count = tl.minimum(TOKEN_BLOCK, tokens - part % CHUNKS * TOKEN_BLOCK)
        weighted += tl.load(means + at + part * (GROUPS * PER_GROUP), mask=valid, other=0.0) * count
    middle = tl.sum(tl.sum(weighted, 2), 1) / number
    spread = tl.zeros([ITEM_BLOCK, PART_BLOCK, CHANNEL_BLOCK], tl.float32)
    for start in range(0, PARTS, PART_BLOCK):
        part = start + tl.arange(0, PART_BLOCK)[None, :, None]
        valid = (part < PARTS) & there
        count = tl.minimum(TOKEN_BLOCK, tokens - part % CHUNKS * TOKEN_BLOCK)
        distance = tl.load(means + at + part * (GROUPS * PER_GROUP), mask=valid, other=0.0) - middle[:, None, None]
        own = tl.load(deviations + at + part * (GROUPS * PER_GROUP), mask=valid, other=0.0)
        spread += tl.where(valid, own + count * distance * distance, 0.0)
    variance = tl.sum(tl.sum(spread, 2), 1) / number
    tl.store(mean + item, middle, mask=item < items)
    tl.store(rstd + item, 1.0 / tl.sqrt(variance + eps), mask=item < items)


@triton.jit
def apply_kernel(
    x,
    weight,
    bias,
    shift,
    mean,
    rstd,
    y,
    image_stride,
    channel_stride,
    token_stride,
    y_channel_stride,
    y_token_stride,
    tokens,
    frames,
    images_per_shift,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    channel_blocks: tl.constexpr = (CHANNELS + CHANNEL_BLOCK - 1) // CHANNEL_BLOCK
    chunks = (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK
    channel = pid % channel_blocks * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    token = (pid // channel_blocks % chunks * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK))[:, None]
    image = (pid // channel_blocks // chunks).to(tl.int64)
    there = channel < CHANNELS
    valid = (token < tokens) & there[None, :]
    far = channel.to(tl.int64)[None, :]  # an image may have more than 2^31 numbers
    at = image * image_stride + token.to(tl.int64) * token_stride + far * channel_stride
    group = image // frames * (CHANNELS // PER_GROUP) + channel // PER_GROUP
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(rstd + group, mask=there, other=0.0) * tl.load(weight + channel, mask=there, other=0.0)
    middle = tl.load(mean + group, mask=there, other=0.0)
    if SHIFT:
        own = tl.load(shift + image // images_per_shift * CHANNELS + channel, mask=there, other=0.0)
        middle -= own.to(tl.float32)
    b = tl.load(bias + channel, mask=there, other=0.0)
    z = (value - middle[None, :]) * scale[None, :] + b[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    at = image * tokens * CHANNELS + token.to(tl.int64) * y_token_stride + far * y_channel_stride
    tl.store(y + at, z.to(y.dtype.element_ty), mask=valid)


def token_and_channel_block(x: Tensor, channels: int, tokens: int) -> dict[str, int]:
    """The tile of the kernels that touch activations, for every architecture the same."""
    rows, columns = (4096, 256) if launch.architecture(x) == "interpreter" else (128, 64)
    return {"TOKEN_BLOCK": min(rows, power_of_2(tokens)), "CHANNEL_BLOCK": min(columns, power_of_2(channels))}


def merge_block(x: Tensor, per_group: int, parts: int) -> dict[str, int]:
    """The tile of the kernel that merges: as many groups as keep 128 threads busy, 512 numbers."""
    numbers = 65_536 if launch.architecture(x) == "interpreter" else 512
    wide = power_of_2(per_group)
    high = min(32, power_of_2(parts), max(1, numbers // wide))
    items = max(1, numbers // (high * wide))
    return {"PARTS": parts, "ITEM_BLOCK": items, "PART_BLOCK": high, "CHANNEL_BLOCK": wide}


def shift_arguments(x: Tensor, shift: Tensor | None) -> tuple[Tensor, int, bool]:
    """A tensor to point at, how many images share a row of it, and whether there is one."""
    return (x, 1, False) if shift is None else (shift, len(x) // len(shift), True)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    eps: float,
    frames: int,
    silu: bool,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write y (n, c, tokens), a dense tensor; return mean and 1 / standard deviation, (n / frames, groups) float32.

    x: (n, c, tokens), of any strides. shift: (n / r, c), contiguous, or None.
    """
    n, channels, tokens = x.shape
    tile = token_and_channel_block(x, channels, tokens)
    chunks, per_group = blocks(tokens, tile["TOKEN_BLOCK"]), channels // num_groups
    programs = n * chunks * blocks(channels, tile["CHANNEL_BLOCK"])
    means, deviations = x.new_empty(2, n, chunks, channels, dtype=torch.float32)
    mean = x.new_empty(n // frames, num_groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    shift, shared, has_shift = shift_arguments(x, shift)
    args = (x, shift, means, deviations, *x.stride(), tokens, shared)
    launch.run(parts_kernel, programs, *args, CHANNELS=channels, SHIFT=has_shift, **tile)
    items, sizes = mean.numel(), {"GROUPS": num_groups, "PER_GROUP": per_group, "CHUNKS": chunks}
    sizes |= {"TOKEN_BLOCK": tile["TOKEN_BLOCK"], **merge_block(x, per_group, frames * chunks)}
    args = (means, deviations, mean, rstd, items, tokens, eps)
    launch.run(merge_kernel, blocks(items, sizes["ITEM_BLOCK"]), *args, **sizes)
    sizes = {"CHANNELS": channels, "PER_GROUP": per_group, "SHIFT": has_shift, "SILU": silu, **tile}
    args = (x, weight, bias, shift, mean, rstd, y, *x.stride(), y.stride(1), y.stride(2), tokens, frames, shared)
    launch.run(apply_kernel, programs, *args, **sizes)
    return mean, rstd
