"""Where a step's time goes by kind of work, and the least that this machine could take for it.

The floor of an operator is the larger of its matrix products' FLOPs over the rate of a square product, and of its
bytes, every input read and every output written once, over the rate of a copy: both of `run.ceilings`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import animatediff_kernels.flops  # noqa: F401  registers the formulas of the package's operators
import torch
from run import ceilings, device_label
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = {  # a kind of work, and parts of its operators' names
    "convolutions": ("conv",),
    "linear layers": ("linear", "addmm", "::mm", "::bmm"),
    "attention": ("scaled_dot_product", "attention"),
    "GroupNorm, LayerNorm": ("group_norm", "layer_norm", "batch_norm"),
    "gates": ("gelu", "silu", "::mul", "geglu"),
    "sums": ("::add",),
    "copies": ("copy", "clone", "cat", "::stack", "pad", "upsample", "::fill_"),
}
OTHERS = "others"
FORMULAS = flop_registry | {  # torch has none for its CPU attention
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ]
}
ONLY_WRITTEN = ("aten::copy_", "aten::fill_")  # their first argument is not read


class Work(TorchDispatchMode):
    """Collects (operator, FLOPs of matrix products, least bytes moved) of everything that runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, inputs, outputs = func.name(), tensors((args, kwargs)), tensors(out)
        known = {x.untyped_storage().data_ptr() for x in inputs}
        is_view = not func._schema.is_mutable and any(x.untyped_storage().data_ptr() in known for x in outputs)
        if not (is_view or "empty" in name):
            formula = FORMULAS.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            read = inputs[name.startswith(ONLY_WRITTEN) :]
            self.found.append((name, flops, sum(size(x) for x in (*read, *outputs))))
        return out

    def floor(self, peaks: tuple[float, float]) -> dict[str, float]:
        """Kind of work -> least seconds; `peaks`: FLOP/s and bytes/s."""
        seconds: dict[str, float] = defaultdict(float)
        for name, flops, moved in self.found:
            seconds[kind_of(name)] += max(flops / peaks[0], moved / peaks[1])
        return seconds


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def size(x: Tensor) -> int:
    """Bytes that x takes in memory, where an expanded tensor is no larger than what it was expanded from."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def kind_of(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), OTHERS)


def measured(step: Callable[[], object], cuda: bool) -> dict[str, float]:
    """Kind of work -> seconds. An operator's helpers, as the sum that adds a convolution's bias, count as its own."""
    seconds: dict[str, float] = defaultdict(float)
    with profile(activities=[ProfilerActivity.CPU] + cuda * [ProfilerActivity.CUDA]) as profiler:
        step()
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:  # kernels, whose time is that of the operators that launched them
            continue
        own, kind = event.self_device_time_total if cuda else event.self_cpu_time_total, OTHERS
        while event is not None:
            kind = kind if kind_of(event.name) == OTHERS else kind_of(event.name)
            event = event.cpu_parent
        seconds[kind] += own / 1e6
    return seconds


def breakdown(step: Callable[[], object], device: torch.device, dtype: torch.dtype) -> None:
    """Print every kind of work: milliseconds, share of the step, least milliseconds and their share of the measured."""
    peaks = ceilings(str(device), dtype)
    print(
        f"{device_label(str(device))}: copies at {peaks[1] / 1e9:.4g} GB/s, products at {peaks[0] / 1e12:.4g} TFLOP/s"
    )
    with Work() as work:  # a first step, which also sets everything up
        step()
    took, floor = measured(step, device.type == "cuda"), work.floor(peaks)
    took["all"], floor["all"] = sum(took.values()), sum(floor.values())
    print(f"{'kind':<22}{'ms':>10}{'of all':>9}{'floor ms':>10}{'floor/ms':>10}")
    for kind in (*KINDS, OTHERS, "all"):
        share = floor[kind] / took[kind] if took[kind] else 0
        print(
            f"{kind:<22}{took[kind] * 1e3:10.2f}{took[kind] / took['all']:9.1%}{floor[kind] * 1e3:10.2f}{share:10.1%}"
        )
    flops, moved = (sum(column) for column in list(zip(*work.found, strict=True))[1:])
    print(f"the products alone: {flops / 1e12:.4g} TFLOP, {flops / peaks[0] * 1e3:.4g} ms")
    print(f"the bytes alone: {moved / 1e9:.4g} GB, {moved / peaks[1] * 1e3:.4g} ms")
