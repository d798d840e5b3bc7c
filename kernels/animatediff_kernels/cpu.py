"""float32 inference on CPUs, faster and equal to rounding: the layout of maps, and oneDNN's products.

What needs gradients, autocast or a compiler gets torch's own layers, and so does everything in `use_backend("torch")`.
"""

from __future__ import annotations

import functools
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff_kernels.dispatch import Choice, requested

NARROWEST = 128  # network whose products are worth a switch, and its maps another layout
FLOAT32_ERROR = 1e-5  # relative, of a sum of 640 equal numbers; in bfloat16 3e-3
WORTH_SWITCHING = 1.3  # oneDNN's speed over MKL's: so far from 1 that all processes on a CPU choose the same
WORTH_SWITCHING_ON_AMD = 0.9  # where oneDNN was faster on both that were measured: 1.05 times on Zen 4, 2.3 on Zen 5

R = TypeVar("R")

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


def laid_out(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, c, h, w), which a network's first convolution takes, in the layout that is fastest for those to come."""
    return x if layout_choice(x, weight).backend == "torch" else x.contiguous(memory_format=torch.channels_last)


def layout_choice(x: Tensor, weight: Tensor) -> Choice:
    """ "channels_last" or "torch", and why.

    Args:
        x: what the network is given.
        weight: of its first convolution, (width, …).
    """
    if reason := left_alone(x, weight) or _narrow(weight):
        return Choice("torch", reason)
    return Choice("channels_last", "Winograd's tiles and the transformers' tokens are read without being transposed")


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """x in the layout of another map, where layers are this package's own."""
    return x if left_alone(x, other) else x.contiguous(memory_format=layout_of(other))


def takes_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last and a layer of this package takes it in torch's place."""
    return not left_alone(x, x) and requested() == "auto" and layout_of(x) == torch.channels_last


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last where x is contiguous in that alone, else torch's default."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def left_alone(x: Tensor, weight: Tensor) -> str:
    """Why torch's own kernels compute this, or nothing."""
    if not on_cpu(x) or not x.dtype == weight.dtype == torch.float32:
        return f"{x.dtype} on {x.device.type}, for float32 on CPUs"
    if torch.is_grad_enabled():
        return "gradients may be needed"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return "compiled, or under autocast"
    return "asked for torch" if requested() == "torch" else ""


def _narrow(weight: Tensor) -> str:
    return f"a network of {len(weight)} channels, expected at least {NARROWEST}" if len(weight) < NARROWEST else ""


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


def with_fast_products(forward: Callable[..., R]) -> Callable[..., R]:
    """A network's method (self, x, …) within `fast_products`; its first layer is `self.conv_in`."""

    @functools.wraps(forward)
    def run(self: nn.Module, x: Tensor, *args: object, **options: object) -> R:
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
    if reason := left_alone(x, weight):
        return Choice("torch", reason)
    if type(x) is not Tensor or x.is_meta:
        return Choice("torch", "a stand-in without contents, which takes no time")
    if reason := _narrow(weight):
        return Choice("torch", reason)
    return onednn_or_mkl()


@functools.cache
def onednn_or_mkl() -> Choice:
    """Which library multiplies float32 matrices faster on this CPU: measured once, in about 30 ms.

    MKL is Intel's, and runs AMD's Zen 5 below half of its speed. With AMX, or bfloat16 on ARM, torch's switch
    would really compute in bfloat16.
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
    if gain < (WORTH_SWITCHING_ON_AMD if _is_amd() else WORTH_SWITCHING):
        return Choice("torch", f"oneDNN multiplies {gain:.2f} times as fast as MKL on this CPU")
    return Choice("onednn", f"{gain:.2f} times as fast as MKL on this CPU")


def _seconds_of(x: Tensor, weight: Tensor) -> float:
    start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
    for _ in range(3):
        F.linear(x, weight)
    return (time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()) - start


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


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
