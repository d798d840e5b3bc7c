"""float32 inference on CPUs, faster and equal to rounding: Winograd convolutions and oneDNN's products.

Nothing is packed or kept: weights are read at every call, so that merging, training and LoRA scales need no notice.
What needs gradients, autocast or a compiler gets torch's own layers, and so does everything in `use_backend("torch")`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff_kernels.dispatch import Choice, requested

FEWEST_CHANNELS = {False: 128, True: 256}  # below, Winograd's transforms take what its products save; True: enlarged
NARROWEST = 128  # network whose products are worth a switch
FEWEST_TILES = 4  # in an image: 8x8 pixels
TILES = 192  # worked on at a time: enough to read the weights seldom, few enough to stay in the cache
WEIGHT_BYTES = 16 * 2**20  # of transformed weights that are worked on at a time, where there are no more tiles
FLOAT32_ERROR = 1e-5  # relative, of a sum of 640 equal numbers; in bfloat16 3e-3
WORTH_SWITCHING = 1.3  # oneDNN's speed over MKL's

# Winograd's F(4, 3) with the points 0, ±1, ±2 and infinity (Lavin and Gray 2016, arXiv 1509.09308, sec. 4.3): the
# transforms of inputs, weights and products. DOUBLED makes six pixels of the enlarged map of four of the small one.
INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
WEIGHT = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # of 24
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
DOUBLED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


_counting = False  # whether tensors without contents go the way of the CPU's


@contextmanager
def counted_as_on_cpu() -> Iterator[None]:
    """Within it tensors on "meta" are computed with as the CPU's are, for whoever counts the memory that they take."""
    global _counting
    _counting = True
    try:
        yield
    finally:
        _counting = False


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" or (_counting and x.is_meta)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv2d(x, weight, bias, padding=1)` by what `conv3x3_choice` says. x: (n, c, h, w); weight: (o, c, 3, 3)."""
    if conv3x3_choice(x, weight).backend == "winograd":
        return _winograd(x, weight, bias, doubled=False)
    return F.conv2d(x, weight, bias, padding=1)


def upsampled_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`conv3x3` of x enlarged twofold by nearest neighbour, (n, o, 2 h, 2 w), computed from the small map."""
    if conv3x3_choice(x, weight, doubled=True).backend == "winograd":
        return _winograd(x, weight, bias, doubled=True)
    return _four_convs(x, weight, bias)


def conv3x3_choice(x: Tensor, weight: Tensor, *, doubled: bool = False) -> Choice:
    """ "winograd" or "torch", and why."""
    side, (o, c) = 2 if doubled else 4, weight.shape[:2]
    if reason := _left_alone(x, weight):
        return Choice("torch", reason)
    if x.shape[-2] % side or x.shape[-1] % side:
        return Choice("torch", f"a map of {x.shape[-2]}x{x.shape[-1]}, expected multiples of {side}")
    if (tiles := x.shape[-2] * x.shape[-1] // side**2) < FEWEST_TILES:
        return Choice("torch", f"{tiles} tiles in an image, Winograd pays from {FEWEST_TILES}")
    if min(o, c) < (fewest := FEWEST_CHANNELS[doubled]):
        return Choice("torch", f"{c} to {o} channels, Winograd pays from {fewest}")
    return Choice("winograd", "fewer multiplications, equal to about 3e-6")


def _left_alone(x: Tensor, weight: Tensor) -> str:
    """Why torch's own kernels compute this, or nothing."""
    if not on_cpu(x) or not x.dtype == weight.dtype == torch.float32:
        return f"{x.dtype} on {x.device.type}, for float32 on CPUs"
    if torch.is_grad_enabled():
        return "gradients may be needed"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return "compiled, or under autocast"
    return "asked for torch" if requested() == "torch" else ""


def _winograd(x: Tensor, weight: Tensor, bias: Tensor, *, doubled: bool) -> Tensor:
    """Tiles of 4x4 outputs as 36 products of transformed inputs and weights, in blocks that stay in the cache."""
    (n, c, h, w), o = x.shape, len(weight)
    taps, step = (4, 2) if doubled else (6, 4)  # pixels a side that a tile reads, and from one tile to the next
    down, across = h // step, w // step
    kept = type(x) is Tensor and not x.is_meta  # and no stand-in, whose constants have no contents
    transforms = (_transforms if kept else _transforms.__wrapped__)(doubled)
    of_input, of_weight, of_output = (t.to(x.device) for t in transforms)
    fitting = max(1, TILES // across)  # rows of tiles in a block
    images, lines = min(n, max(1, fitting // down)), min(down, fitting)  # some whole images, or a part of one
    at_once = images == n and lines == down
    outputs = max(1, min(o, WEIGHT_BYTES // (36 * c * x.itemsize))) if at_once else o
    padded = x.new_zeros(images, step * lines + 2, w + 2, c)  # what a block reads
    rows = padded.stride()
    strides = (rows[1], rows[2], rows[0], step * rows[1], step * rows[2], 1)
    out = x.new_empty(n, o, 4 * down, 4 * across)
    tiles = images * lines * across
    room = [x.new_empty(size) for size in (taps**2 * tiles * c, 36 * tiles * c, 36 * outputs * c)]
    room += [x.new_empty(size * tiles * outputs) for size in (36, 16)]
    for i, top in product(range(0, n, images), range(0, down, lines)):
        k, d = min(images, n - i), min(lines, down - top)
        _fill(padded[:k, :, 1:-1], x[i : i + k].permute(0, 2, 3, 1), top * step)
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
            torch.add(sums.permute(2, 5, 3, 0, 4, 1), bias[part].view(-1, 1, 1, 1, 1), out=target)
    return out


def _fill(padded: Tensor, x: Tensor, top: int) -> None:
    """Rows `top` - 1 and on of x (n, h, w, c), as many as fit, and zeros beyond its edges."""
    above, below = int(top == 0), min(len(padded[0]), x.shape[1] + 1 - top)  # rows that x has begin and end here
    padded[:, :above], padded[:, below:] = 0, 0
    padded[:, above:below] = x[:, top - 1 + above : top - 1 + below]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: torch.Size(shape).numel()].view(shape)


@functools.cache
def _transforms(doubled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of 2-D tiles, inputs (36, taps²), weights (36, 9) and outputs (16, 36): each axis has its own."""
    with torch.inference_mode(False):
        one = [torch.tensor(rows, dtype=torch.float64) for rows in (INPUT, WEIGHT, OUTPUT, DOUBLED)]
        of_input = one[0] @ one[3] if doubled else one[0]
        return tuple(torch.kron(t, t).float() for t in (of_input, one[1] / 24, one[2]))  # type: ignore[return-value]


def _four_convs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An output row sees its three rows of the large map as two of the small one: an even row as (above, own, own), an
    odd one as (own, own, below). The same holds for columns, so the 3x3 convolution is four 2x2 ones with the weights
    of equal inputs summed: 4/9 of the work.
    """
    n, h, w = x.shape[0], *x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    out = x.new_empty(n, len(weight), h, 2, w, 2)
    for i, rows in enumerate(_halves(weight, 2)):
        for j, kernel in enumerate(_halves(rows, 3)):
            out[:, :, :, i, :, j] = F.conv2d(padded[:, :, i : i + h + 1, j : j + w + 1], kernel, bias)
    return out.view(n, len(weight), 2 * h, 2 * w)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps along an axis as the two of an even and the two of an odd output."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


# ---- products ---------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_inside = 0  # `fast_products` blocks that are entered, of all threads
_callers_setting: str | None = None  # what to restore after the last of them


@contextmanager
def fast_products(x: Tensor, weight: Tensor) -> Iterator[None]:
    """Within it float32 products run in oneDNN where `products_choice` says so. For networks, not for single layers.

    torch's switch is one of the process: a thread that computes beside the block computes as fast, and one that sets it
    meanwhile has its setting undone.
    """
    if products_choice(x, weight).backend != "onednn":
        yield
        return
    global _inside, _callers_setting
    with _lock:
        if _inside == 0:
            _callers_setting = _get_precision()
            _set_precision("bf16")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set_precision(_callers_setting)


def with_fast_products(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A network's `forward(self, x, …)` within `fast_products`; its first layer is `self.conv_in`."""

    @functools.wraps(forward)
    def run(self: nn.Module, x: Tensor, *args: object, **options: object) -> Tensor:
        if torch.compiler.is_compiling():
            return forward(self, x, *args, **options)
        with fast_products(x, self.conv_in.weight):
            return forward(self, x, *args, **options)

    return run


@contextmanager
def plain_products() -> Iterator[None]:
    """Within it products run as torch runs them, also in `fast_products`: oneDNN is ten times slower on tiny ones."""
    if not _inside:
        yield
        return
    _set_precision(_callers_setting)
    try:
        yield
    finally:
        _set_precision("bf16")


def products_choice(x: Tensor, weight: Tensor) -> Choice:
    """ "onednn" or "torch", and why.

    Args:
        x: what the network is given.
        weight: of its first layer, (width, …).
    """
    if reason := _left_alone(x, weight):
        return Choice("torch", reason)
    if type(x) is not Tensor or x.is_meta:
        return Choice("torch", "a stand-in without contents, which takes no time")
    if len(weight) < NARROWEST:
        return Choice("torch", f"a network of {len(weight)} channels, oneDNN pays from {NARROWEST}")
    return onednn_or_mkl()


@functools.cache
def onednn_or_mkl() -> Choice:
    """Which library multiplies float32 matrices faster on this CPU: measured once, in about 30 ms.

    MKL runs below half of AMD's AVX-512 CPUs' speed. With AMX, or bfloat16 on ARM, torch's switch would really compute
    in bfloat16.
    """
    if not torch.backends.mkldnn.is_available():
        return Choice("torch", "this torch has no oneDNN")
    if _has_amx():
        return Choice("torch", "with AMX the switch computes in bfloat16")
    x, weight = torch.full((512, 640), 1.003), torch.ones(640, 640)  # 1.003 is 1 in bfloat16
    own = _get_precision()
    seconds = {}
    try:
        for setting in ("bf16", own):
            _set_precision(setting)
            error = (F.linear(x, weight).double() / (640 * x[0, 0].double()) - 1).abs().max()
            if error > FLOAT32_ERROR:
                return Choice("torch", f"the switch computes in fewer bits on this CPU: error {error:.0e}")
            seconds[setting] = min(_seconds_of(x, weight) for _ in range(4))
    finally:
        _set_precision(own)
    gain = seconds[own] / seconds["bf16"]
    if gain < WORTH_SWITCHING:
        return Choice("torch", f"oneDNN multiplies {gain:.2f} times as fast as MKL on this CPU")
    return Choice("onednn", f"{gain:.2f} times as fast as MKL on this CPU")


def _seconds_of(x: Tensor, weight: Tensor) -> float:
    start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
    for _ in range(3):
        F.linear(x, weight)
    return (time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()) - start


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _get_precision() -> str:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return torch.get_float32_matmul_precision() if matmul is None else matmul.fp32_precision


def _set_precision(value: str | None) -> None:
    """Of oneDNN's float32 products; torch before 2.9 has one setting for all devices, whose "medium" is "bf16"."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        torch.set_float32_matmul_precision("medium" if value == "bf16" else str(value))
    else:
        matmul.fp32_precision = value
