"""Convolutions in float32 on CPUs, faster and equal to rounding: Winograd's, and maps as rows of channels.

Nothing is packed or kept: weights are read at every call, so that merging, training and LoRA scales need no notice.
"""

from __future__ import annotations

import functools
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff_kernels.cpu import layout_of, left_alone
from animatediff_kernels.dispatch import Choice

FEW_PIXELS = 16  # of an image, for which it does not pay to reorder weights
MOST_COMPUTED = 1.5  # pixels of Winograd's tiles for one of the map
FEWEST_CHANNELS = {False: 128, True: 256}  # below, Winograd's transforms take what its products save; True: enlarged
TILES = 192  # worked on at a time: enough to read the weights seldom, few enough to stay in the cache
WEIGHT_BYTES = 16 * 2**20  # of transformed weights that are worked on at a time, where there are no more tiles

# Winograd's F(4, 3) (Lavin and Gray 2016, arXiv 1509.09308) multiplies polynomials by their values at 0, four points
# and infinity. Reciprocal pairs round well (Alam et al. 2022, arXiv 2201.10369): these err half as much as ±1 and ±2.
POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
# Six pixels of the enlarged map are made of four of the small one.
DOUBLED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]

Affine = tuple[Tensor, Tensor]  # scale and offset of each channel of each image, (n, 1, c)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """`torch.nn.functional.conv2d` by what `conv_choice` says. x: (n, c, h, w); weight: (o, c, k, k)."""
    way = conv_choice(x, weight, stride=stride, padding=padding).backend
    if way == "winograd":
        return winograd(x, weight, bias)
    if way == "rows":
        return _by_rows(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


def upsampled_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x enlarged twofold by nearest neighbour, (n, o, 2 h, 2 w), computed from the small map."""
    if conv_choice(x, weight, doubled=True).backend == "winograd":
        return winograd(x, weight, bias, doubled=True)
    return _four_convs(x, weight, bias)


def conv_choice(x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 1, doubled: bool = False) -> Choice:
    """ "winograd", "rows" or "torch", and why. `doubled`: of x enlarged twofold, "winograd", "four" or "torch"."""
    if x.dim() != 4 or not x.numel():
        return Choice("torch", f"a map of {(*x.shape,)}, expected (n, c, h, w)")
    side, (o, c, k) = 2 if doubled else 4, weight.shape[:3]
    area = x.shape[-2] * x.shape[-1]
    computed = side**2 * -(-x.shape[-2] // side) * -(-x.shape[-1] // side)
    if reason := left_alone(x, weight):
        return Choice("torch", reason)
    if (k, stride, padding) != (3, 1, 1):
        reason = f"a {k}x{k} kernel of stride {stride}, Winograd is for 3x3 and 1"
    elif computed > MOST_COMPUTED * area:
        reason = f"tiles of {side}x{side} compute {computed} pixels of a map of {area}"
    elif min(o, c) < (fewest := FEWEST_CHANNELS[doubled]):
        reason = f"{c} to {o} channels, Winograd pays from {fewest}"
    else:
        return Choice("winograd", "fewer multiplications, equal to about 1e-6")
    pixels = out_size(x.shape[-2], k, stride, padding) * out_size(x.shape[-1], k, stride, padding)
    if doubled:
        return Choice("four", reason)
    last = layout_of(x) == torch.channels_last or (area == 1 and min(o, c) >= FEWEST_CHANNELS[False])  # 1x1 is both
    if pixels <= FEW_PIXELS and last:
        return Choice("rows", f"{pixels} pixels, torch would first bring the weights into another order")
    return Choice("torch", reason)


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """A convolution of a channels_last map as a product of matrices: a row is what one pixel of the output sees.

    The weights are read as they lie, (o, c k k); torch brings them into another order first, at every call.
    """
    (n, c, h, w), k = x.shape, weight.shape[-1]
    if h == w == 1 and k == 3 and padding == 1:  # the other taps see zeros alone
        weight, k, padding = weight[:, :, 1:2, 1:2], 1, 0
    padded = x.permute(0, 2, 3, 1)
    if padding:
        padded = F.pad(padded, (0, 0, padding, padding, padding, padding))
    down, across = (out_size(size, k, stride, padding) for size in (h, w))
    image, line, pixel, channel = padded.stride()
    shape, strides = (n, down, across, c, k, k), (image, stride * line, stride * pixel, channel, line, pixel)
    return F.linear(padded.as_strided(shape, strides).flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, doubled: bool = False, before: Affine | None = None
) -> Tensor:
    """Tiles of 4x4 outputs as 36 products of transformed inputs and weights, in blocks that stay in the cache.

    Args:
        x: (n, c, h, w), channels_last or not, as the result is then. weight: (o, c, 3, 3).
        doubled: of x enlarged twofold by nearest neighbour.
        before: the convolution is that of silu(x * scale + offset), which is never in memory as a whole.
    """
    (n, c, h, w), o = x.shape, len(weight)
    taps, step = (4, 2) if doubled else (6, 4)  # pixels a side that a tile reads, and from one tile to the next
    down, across = -(-h // step), -(-w // step)
    kept = type(x) is Tensor and not x.is_meta  # and no stand-in, whose constants have no contents
    transforms = (_transforms if kept else _transforms.__wrapped__)(doubled)
    of_input, of_weight, of_output = (t.to(x.device) for t in transforms)
    fitting = max(1, TILES // across)  # rows of tiles in a block
    images, lines = min(n, max(1, fitting // down)), min(down, fitting)  # some whole images, or a part of one
    at_once = images == n and lines == down
    outputs = max(1, min(o, WEIGHT_BYTES // (36 * c * x.itemsize))) if at_once else o
    out = torch.empty((n, o, 4 * down, 4 * across), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    padded = x.new_zeros(images, step * lines + 2, step * across + 2, c)  # what a block reads
    rows = padded.stride()
    strides = (rows[1], rows[2], rows[0], step * rows[1], step * rows[2], 1)
    added = x.new_zeros(o) if bias is None else bias
    rows_before = () if before is None else tuple(t[:, None] for t in before)
    tiles = images * lines * across
    room = [x.new_empty(size) for size in (taps**2 * tiles * c, 36 * tiles * c, 36 * outputs * c)]
    room += [x.new_empty(size * tiles * outputs) for size in (36, 16)]
    for i, top in product(range(0, n, images), range(0, down, lines)):
        k, d = min(images, n - i), min(lines, down - top)
        here = tuple(t[i : i + k] for t in rows_before)
        _fill(padded[:k, :, 1 : w + 1], x[i : i + k].permute(0, 2, 3, 1), top * step, *here)
        patches = padded.as_strided((taps, taps, k, d, across, c), strides)
        read = _view(room[0], taps, taps, k, d, across, c).copy_(patches)
        inputs = _view(room[1], 36, k * d * across, c)
        torch.mm(of_input, read.view(taps**2, -1), out=inputs.view(36, -1))
        for j in range(0, o, outputs):
            part = slice(j, min(j + outputs, o))
            size = part.stop - j
            weights = _view(room[2], 36, size, c)
            if at_once or i == top == 0:
                torch.mm(of_weight, weight[part].reshape(size * c, 9).t(), out=weights.view(36, -1))
            products = torch.bmm(inputs, weights.transpose(1, 2), out=_view(room[3], 36, k * d * across, size))
            sums = _view(room[4], 4, 4, k, d, across, size)
            torch.mm(of_output, products.view(36, -1), out=sums.view(16, -1))
            target = out[i : i + k, part, 4 * top : 4 * (top + d)].unflatten(3, (across, 4)).unflatten(2, (d, 4))
            torch.add(sums.permute(2, 5, 3, 0, 4, 1), added[part].view(-1, 1, 1, 1, 1), out=target)
    side = 2 if doubled else 1
    if out.shape[2:] == (side * h, side * w):
        return out
    return out[..., : side * h, : side * w].contiguous(memory_format=layout_of(x))


def _fill(padded: Tensor, x: Tensor, top: int, *before: Tensor) -> None:
    """Rows `top` - 1 and on of x (n, h, w, c), as many as fit, and zeros beyond its edges."""
    above, below = int(top == 0), min(len(padded[0]), x.shape[1] + 1 - top)  # rows that x has begin and end here
    padded[:, :above], padded[:, below:] = 0, 0
    target, rows = padded[:, above:below], x[:, top - 1 + above : top - 1 + below]
    if before:
        scale, offset = before
        F.silu(torch.addcmul(offset, rows, scale, out=target), inplace=True)
    else:
        target.copy_(rows)


def _view(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: torch.Size(shape).numel()].view(shape)


@functools.cache
def _transforms(doubled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of 2-D tiles, inputs (36, taps²), weights (36, 9) and outputs (16, 36): each axis has its own."""
    with torch.inference_mode(False):
        points = torch.tensor(POINTS, dtype=torch.float64)[:, None]
        powers = torch.zeros(6, 6, dtype=torch.float64)  # a row for each point; infinity's sees the highest alone
        powers[:5], powers[5, 5] = points ** torch.arange(6), 1
        of_weight, of_output = powers[:, :3].clone(), powers[:, :4].T.clone()
        of_weight[5, 2] = of_output[3, 5] = 1
        of_input = torch.linalg.inv(powers).T  # the transposed way back from values to coefficients
        if doubled:
            of_input = of_input @ torch.tensor(DOUBLED, dtype=torch.float64)
        return tuple(torch.kron(t, t).float() for t in (of_input, of_weight, of_output))  # type: ignore[return-value]


def _four_convs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An output row sees its three rows of the large map as two of the small one: an even row as (above, own, own), an
    odd one as (own, own, below). The same holds for columns, so the 3x3 convolution is four 2x2 ones with the weights
    of equal inputs summed: 4/9 of the work.
    """
    n, h, w = x.shape[0], *x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    out = torch.empty((n, len(weight), 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    for i, rows in enumerate(_halves(weight, 2)):
        for j, kernel in enumerate(_halves(rows, 3)):
            out[:, :, i::2, j::2] = conv2d(padded[:, :, i : i + h + 1, j : j + w + 1], kernel, bias)
    return out


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps along an axis as the two of an even and the two of an odd output."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)
