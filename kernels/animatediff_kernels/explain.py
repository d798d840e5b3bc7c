"""What computes a call, and why, without computing it."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from animatediff_kernels import calibration, dispatch
from animatediff_kernels.cpu import layout_choice, products_choice
from animatediff_kernels.cpu_convolutions import conv_choice
from animatediff_kernels.dispatch import SIZES, Call, Choice, choose, use_backend

CPU_SIZES = {  # of what the CPU alone has ways of its own for; `width` of a network is that of its first convolution
    "conv2d": ("channels", "outputs", "height", "width", "kernel", "stride", "doubled"),
    "layout": ("width",),
    "products": ("width",),
}
DEFAULTS = {"kernel": 3, "stride": 1, "doubled": 0}


def explain(
    op: str,
    *,
    rows: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    backend: str | None = None,
    **shape: int,
) -> Choice:
    """Print and return which backend such a call would get, and why.

    Args:
        op: a key of `dispatch.SIZES` or of `CPU_SIZES`: "conv2d", the "layout" of a network's maps, and the library of
            its "products".
        rows: tokens of all images: 32 * 64 * 64 at the finest level of a guided clip of 16 frames at 512x512. "layout"
            and "products" have none.
        device: a device, or as `Call.device` spells it: "sm_90", "cpu", …
        shape: the sizes of `Call.shape`, such as frames=16, head_dim=40, or those that `CPU_SIZES` names. The network
            of a "conv2d" is taken to be as wide as its channels or outputs, whichever are more.

    Raises: ValueError for an operation or a size that there is not, or one that is missing.
    """
    known = SIZES | CPU_SIZES
    if op not in known:
        raise ValueError(f"got op={op!r}, expected one of {', '.join(known)}")
    if unknown := sorted(shape.keys() - set(known[op])):
        raise ValueError(f"got {unknown[0]}, expected sizes of {op}: {', '.join(known[op])}")
    if not rows and op not in ("layout", "products"):
        raise ValueError(f"got no rows, expected those of {op}: tokens of all images")
    place = ""
    if isinstance(device, torch.device) or (device.startswith("cuda") and torch.cuda.is_available()):
        place = str(torch.empty(0, device=device).device)
        device = dispatch.device_name(torch.device(device))
        if device.startswith("sm_"):
            calibration.load(place)
    sizes = tuple((name, shape[name]) for name in known[op] if name in shape)
    call = Call(op, device, dtype, grad, rows, sizes, place)
    choice = choose(call, backend) if op in SIZES else _of_the_cpu(call, backend)
    counted = f" rows={rows}" if rows else ""
    print(f"{' '.join(call.key)}{counted}: {choice.backend}, {choice.reason}")
    return choice


def _of_the_cpu(call: Call, backend: str | None) -> Choice:
    sizes = DEFAULTS | dict(call.shape)
    if missing := [name for name in CPU_SIZES[call.op] if name not in sizes]:
        raise ValueError(f"got no {missing[0]}, expected sizes of {call.op}: {', '.join(CPU_SIZES[call.op])}")
    if call.device not in ("cpu", "interpreter"):
        return Choice("torch", f"{call.device} has no way of its own, only CPUs have")
    with use_backend(backend) if backend else nullcontext(), torch.set_grad_enabled(call.grad):
        if call.op != "conv2d":
            x, weight = torch.empty(0, dtype=call.dtype), torch.empty(sizes["width"], 1, dtype=call.dtype)
            return layout_choice(x, weight) if call.op == "layout" else products_choice(x, weight)
        height, width, kernel = sizes["height"], sizes["width"], sizes["kernel"]
        weight = torch.empty(sizes["outputs"], sizes["channels"], kernel, kernel, dtype=call.dtype)
        images = max(1, call.rows // (height * width))
        wide = torch.empty(max(sizes["outputs"], sizes["channels"]), 1, dtype=call.dtype)
        last = layout_choice(weight, wide).backend == "channels_last"
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(images, sizes["channels"], height, width, dtype=call.dtype, memory_format=layout)
        options = {"stride": sizes["stride"], "padding": kernel // 2, "doubled": bool(sizes["doubled"])}
        return conv_choice(x, weight, **options)
