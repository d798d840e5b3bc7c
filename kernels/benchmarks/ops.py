"""What is measured of each operation: its inputs, who can compute it, and how much work it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from animatediff_kernels import (
    attention,
    geglu,
    group_norm_silu,
    layer_norm,
    linear_geglu,
    temporal_attention,
)
from animatediff_kernels.attention.reference import attention_reference
from animatediff_kernels.geglu.reference import geglu_reference
from animatediff_kernels.group_norm_silu.reference import group_norm_silu_reference
from animatediff_kernels.layer_norm.reference import layer_norm_reference
from animatediff_kernels.linear_geglu.reference import linear_geglu_reference
from animatediff_kernels.temporal_attention.reference import temporal_attention_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Sizes = dict[str, int]
Function = Callable[..., Tensor]
EPS = 1e-5
SDPA = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
OURS = ("torch", "triton", "triton-apart")  # the package's two backends, and two of its steps in place of one


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        shapes: sizes -> the shapes of its inputs.
        batched: how many of them, from the first, have the independent items along their first axis; the others are
            weights, shared by all items.
        items: sizes -> how many independent items there are.
        run: (sizes, backend) -> the package's function of the inputs.
        reference: sizes -> the maths, for float64.
        plain: sizes -> what a network without this package calls; of attention, with the copies that SDPA needs.
        flops: sizes -> matrix products of a forward pass.
        flops_backward: how many times as much a backward pass is.
        passes: how often the inputs and outputs go through memory at least, forward and backward, in units of `unit`.
        unit: sizes -> numbers in the tensor that `passes` counts.
        key: sizes -> `Call.rows` and `Call.shape` of the dispatch.
        attends: whether torch has its SDPA backends for it.
        apart: the same by other functions of the package in Triton, or None.
    """

    shapes: Callable[[Sizes], list[tuple[int, ...]]]
    batched: int
    items: Callable[[Sizes], int]
    run: Callable[[Sizes, str], Function]
    reference: Callable[[Sizes], Function]
    plain: Callable[[Sizes], Function]
    passes: tuple[float, float]
    unit: Callable[[Sizes], int]
    key: Callable[[Sizes], dict[str, int]]
    flops: Callable[[Sizes], int] = lambda s: 0
    flops_backward: float = 2.5
    attends: bool = False
    apart: Function | None = None


def _temporal_sdpa(s: Sizes) -> Function:
    """Pixels become the batch: three copies in, one out."""
    shape = s["clips"], s["frames"], s["tokens"], s["heads"], s["head_dim"]

    def by_pixel(x: Tensor) -> Tensor:
        return x.view(shape).permute(0, 2, 3, 1, 4).reshape(-1, s["heads"], s["frames"], s["head_dim"])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(by_pixel(q), by_pixel(k), by_pixel(v))
        by_frame = out.view(s["clips"], s["tokens"], s["heads"], s["frames"], s["head_dim"]).permute(0, 3, 1, 2, 4)
        return by_frame.reshape(q.shape)

    return function


def _attention_sdpa(s: Sizes) -> Function:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(s["rows"], -1, s["heads"], s["head_dim"]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(s["images"], s["tokens"], -1)

    return function


def _group_norm_silu(s: Sizes) -> Function:
    def function(x: Tensor, w: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift[..., None, None]
        if s["frames"] > 1:
            clips = F.group_norm(x.unflatten(0, (-1, s["frames"])).transpose(1, 2), s["groups"], w, b, EPS)
            y = clips.transpose(1, 2).flatten(0, 1)
        else:
            y = F.group_norm(x, s["groups"], w, b, EPS)
        return F.silu(y) if s["silu"] else y

    return function


def _layer_norm(x: Tensor, w: Tensor, b: Tensor, code: Tensor | None = None) -> Tensor:
    y = F.layer_norm(x, w.shape, w, b, EPS)
    return y if code is None else (y.unflatten(0, (-1, len(code))) + code[:, None]).flatten(0, 1)


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


OPS = {
    "temporal_attention": Op(
        shapes=lambda s: 3 * [(s["clips"] * s["frames"], s["tokens"], s["heads"] * s["head_dim"])],
        batched=3,
        items=lambda s: s["clips"],
        run=lambda s, backend: (
            lambda q, k, v: temporal_attention(q, k, v, frames=s["frames"], num_heads=s["heads"], backend=backend)
        ),
        reference=lambda s: lambda q, k, v: temporal_attention_reference(q, k, v, s["frames"], s["heads"]),
        passes=(4, 7),  # q, k, v, out; then q, k, v, dout and three gradients
        unit=lambda s: s["clips"] * s["frames"] * s["tokens"] * s["heads"] * s["head_dim"],
        key=lambda s: {
            "rows": s["clips"] * s["frames"] * s["tokens"],
            "frames": s["frames"],
            "head_dim": s["head_dim"],
        },
        flops=lambda s: 4 * s["clips"] * s["tokens"] * s["frames"] ** 2 * s["heads"] * s["head_dim"],
        plain=_temporal_sdpa,
        attends=True,
    ),
    "attention": Op(
        shapes=lambda s: (
            [(s["images"], s["tokens"], s["heads"] * s["head_dim"])]
            + 2 * [(s["rows"], s["keys"], s["heads"] * s["head_dim"])]
        ),
        batched=3,
        items=lambda s: s["rows"],
        run=lambda s, backend: lambda q, k, v: attention(q, k, v, num_heads=s["heads"], backend=backend),
        reference=lambda s: lambda q, k, v: attention_reference(q, k, v, s["heads"]),
        passes=(2, 4),  # per unit of q and k together: q, out, k, v; then all and their gradients
        unit=lambda s: (s["images"] * s["tokens"] + s["rows"] * s["keys"]) * s["heads"] * s["head_dim"],
        key=lambda s: (
            {"rows": s["images"] * s["tokens"], "head_dim": s["head_dim"]}
            | (
                {"tokens": s["tokens"]}
                if (s["images"], s["tokens"]) == (s["rows"], s["keys"])
                else {"keys": s["keys"], "shared": int(s["rows"] < s["images"])}
            )
        ),
        flops=lambda s: 4 * s["images"] * s["tokens"] * s["keys"] * s["heads"] * s["head_dim"],
        plain=_attention_sdpa,
        attends=True,
    ),
    "group_norm_silu": Op(
        shapes=lambda s: (
            [(s["images"], s["channels"], s["height"], s["width"])]
            + 2 * [(s["channels"],)]
            + s["shift"] * [(1, s["channels"])]
        ),
        batched=1,
        items=lambda s: s["images"] // s["frames"],
        run=lambda s, backend: (
            lambda x, w, b, shift=None: group_norm_silu(
                *(x, s["groups"], w, b),
                **{"eps": EPS, "frames": s["frames"], "silu": bool(s["silu"]), "shift": shift, "backend": backend},
            )
        ),
        reference=lambda s: (
            lambda x, w, b, shift=None: group_norm_silu_reference(
                x, s["groups"], w, b, shift, EPS, s["frames"], bool(s["silu"])
            )
        ),
        plain=_group_norm_silu,
        passes=(3, 5),  # the statistics need a pass of their own
        unit=lambda s: s["images"] * s["channels"] * s["height"] * s["width"],
        key=lambda s: {
            "rows": s["images"] * s["height"] * s["width"],
            "channels": s["channels"],
            "images": s["frames"],
            "silu": s["silu"],
            "shift": s["shift"],
            "channels_last": 1,
        },
    ),
    "layer_norm": Op(
        shapes=lambda s: (
            [(s["images"], s["tokens"], s["width"])]
            + 2 * [(s["width"],)]
            + ([(s["frames"], s["width"])] if s["frames"] else [])
        ),
        batched=1,
        items=lambda s: s["images"] // max(s["frames"], 1),
        run=lambda s, backend: lambda x, w, b, code=None: layer_norm(x, w, b, code=code, eps=EPS, backend=backend),
        reference=lambda s: lambda x, w, b, code=None: layer_norm_reference(x, w, b, code, EPS),
        plain=lambda s: _layer_norm,
        passes=(2, 3),
        unit=lambda s: s["images"] * s["tokens"] * s["width"],
        key=lambda s: {"rows": s["images"] * s["tokens"], "width": s["width"], "code": int(s["frames"] > 0)},
    ),
    "geglu": Op(
        shapes=lambda s: [(s["images"], s["tokens"], 2 * s["width"])],
        batched=1,
        items=lambda s: s["images"],
        run=lambda s, backend: lambda x: geglu(x, backend=backend),
        reference=lambda s: geglu_reference,
        plain=lambda s: _geglu,
        passes=(3, 5),
        unit=lambda s: s["images"] * s["tokens"] * s["width"],
        key=lambda s: {"rows": s["images"] * s["tokens"], "width": s["width"]},
    ),
    "linear_geglu": Op(
        shapes=lambda s: [(s["images"], s["tokens"], s["width"]), (2 * s["inner"], s["width"]), (2 * s["inner"],)],
        batched=1,
        items=lambda s: s["images"],
        run=lambda s, backend: lambda x, w, b: linear_geglu(x, w, b, backend=backend),
        reference=lambda s: linear_geglu_reference,
        plain=lambda s: lambda x, w, b: _geglu(F.linear(x, w, b)),
        apart=lambda x, w, b: geglu(F.linear(x, w, b), backend="triton"),
        passes=(1, 1),  # and something more backward, where the products take longer than memory in any case
        unit=lambda s: s["images"] * s["tokens"] * (s["width"] + s["inner"]) + 2 * s["inner"] * s["width"],
        key=lambda s: {"rows": s["images"] * s["tokens"], "width": s["width"], "inner": s["inner"]},
        flops=lambda s: 4 * s["images"] * s["tokens"] * s["width"] * s["inner"],
        flops_backward=2,
    ),
}


def make_inputs(op: Op, sizes: Sizes, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Standard normal inputs; images in the memory format of the device, as `components.place` gives it."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in op.shapes(sizes)]
    last = device.startswith("cuda")
    return [x.to(memory_format=torch.channels_last) if x.ndim == 4 and last else x for x in inputs]


def providers(op: Op, sizes: Sizes) -> dict[str, Function]:
    """Everyone who may compute it, torch's first; some will refuse a device, a dtype or a size when called.

    Images come back in the memory format that they came in, as what follows them in the network wants it.
    """
    plain = _as_it_came(op.plain(sizes))
    found = {"compile": torch.compile(plain, dynamic=False)}
    found |= {name: _within(backend, plain) for name, backend in SDPA.items()} if op.attends else {"eager": plain}
    found |= {backend: _as_it_came(op.run(sizes, backend)) for backend in ("torch", "triton")}
    return found | ({"triton-apart": op.apart} if op.apart else {})


def _as_it_came(function: Function) -> Function:
    def same_format(x: Tensor, *others: Tensor) -> Tensor:
        out = function(x, *others)
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return out.contiguous(memory_format=torch.channels_last) if last else out

    return same_format


def _within(backend: SDPBackend, function: Function) -> Function:
    def forced(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return function(*inputs)

    return forced


def call(
    function: Function, inputs: Sequence[Tensor], mode: str, cotangent: Callable[[Tensor], Tensor] = torch.ones_like
) -> Callable[[], list[Tensor]]:
    """What is timed: the output of `function`; in mode fwd+bwd also the gradients of all inputs.

    cotangent: what to multiply the output with; it is made beforehand.
    """

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    if mode == "fwd":
        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    given = cotangent(*forward())

    def both() -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, given)]

    return both


def work(op: Op, sizes: Sizes, mode: str, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP of matrix products, least bytes moved) of a call."""
    backward = mode != "fwd"
    numbers = op.unit(sizes) * (op.passes[0] + backward * op.passes[1])
    return op.flops(sizes) * (1 + backward * op.flops_backward), numbers * dtype.itemsize
