"""What the bounds of these tests are worth: the maths in plain torch is within, one slip of a kernel is not."""

import pytest
import torch
import torch.nn.functional as F
from animatediff_kernels.attention.reference import attention_reference
from animatediff_kernels.geglu.reference import geglu_reference
from animatediff_kernels.group_norm_silu.reference import group_norm_silu_reference
from animatediff_kernels.layer_norm.reference import layer_norm_reference
from animatediff_kernels.linear_geglu.reference import linear_geglu_reference
from animatediff_kernels.temporal_attention.reference import temporal_attention_reference
from torch import Tensor

from tests.kernels.checks import errors

pytestmark = pytest.mark.numeric
HEADS, FRAMES = 2, 4


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1, keys: slice = slice(None), padded: int = 0) -> Tensor:
    """Written out, with a place for every slip."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    k, v = (F.pad(x[:, :, keys], (0, 0, 0, padded)) for x in (k, v))
    return ((q @ k.mT * (scale * q.shape[-1] ** -0.5)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def shared(x: Tensor, images: int) -> Tensor:
    return x.repeat_interleave(images // len(x), 0)


def along_frames(function):
    """Of a function of (n, tokens, width): every pixel's frames are the tokens."""

    def turned(*qkv: Tensor) -> Tensor:
        pixels = [x.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1) for x in qkv]
        return function(*pixels).unflatten(0, (-1, qkv[0].shape[1])).transpose(1, 2).flatten(0, 1)

    return turned


class HalfOfDelta(torch.autograd.Function):
    """Attention whose backward forgets the sum over the row in dS = P (dP - rowsum(P dP))."""

    @staticmethod
    def forward(ctx, scores: Tensor) -> Tensor:
        ctx.save_for_backward(p := scores.softmax(-1))
        return p

    @staticmethod
    def backward(ctx, dp: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return p * dp


def without_row_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return (HalfOfDelta.apply(q @ k.mT * q.shape[-1] ** -0.5) @ v).transpose(1, 2).flatten(2)


def normalise(x, w, b, shift, *, eps=1e-5, frames=2, unbiased=False, silu=True, cancel=False):
    x = x + shared(shift, len(x))[:, :, None, None]
    groups = x.unflatten(0, (-1, frames)).unflatten(2, (2, -1))
    mean = groups.mean((1, 3, 4, 5), keepdim=True)
    variance = groups.var((1, 3, 4, 5), keepdim=True, unbiased=unbiased)
    if cancel:
        variance = (groups.square().mean((1, 3, 4, 5), keepdim=True) - mean**2).clamp(min=0)
    y = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape) * w[:, None, None] + b[:, None, None]
    return F.silu(y) if silu else y


def normalise_tokens(x, w, b, code, *, unbiased=False, drop=0, roll=0):
    kept = x[..., : x.shape[-1] - drop]
    mean, variance = kept.mean(-1, keepdim=True), kept.var(-1, keepdim=True, unbiased=unbiased)
    code = code.roll(roll, 0).repeat(len(x) // len(code), 1)
    return (x - mean) / (variance + 1e-5).sqrt() * w + b + code[:, None]


def gate(x: Tensor, *, approximate: str = "none", swapped: bool = False) -> Tensor:
    value, gates = x.chunk(2, -1)
    return gates * F.gelu(value) if swapped else value * F.gelu(gates, approximate=approximate)


OPS = {  # name -> the reference, the shapes of its inputs, the maths again, and slips of it
    "attention": (
        lambda q, k, v: attention_reference(q, k, v, HEADS),
        [(4, 21, 80), (2, 77, 80), (2, 77, 80)],
        lambda q, k, v: attend(q, shared(k, 4), shared(v, 4)),
        {
            "no scale": lambda q, k, v: attend(q, shared(k, 4), shared(v, 4), scale=40**0.5),
            "scaled by the width of all heads": lambda q, k, v: attend(q, shared(k, 4), shared(v, 4), scale=0.5**0.5),
            "the last key is missed": lambda q, k, v: attend(q, shared(k, 4), shared(v, 4), keys=slice(-1)),
            "padding up to a tile": lambda q, k, v: attend(q, shared(k, 4), shared(v, 4), padded=51),
            "the other image's text": lambda q, k, v: attend(q, k.repeat(2, 1, 1), v.repeat(2, 1, 1)),
            "no row sums in the gradient": lambda q, k, v: without_row_sums(q, shared(k, 4), shared(v, 4)),
        },
    ),
    "temporal_attention": (
        lambda q, k, v: temporal_attention_reference(q, k, v, FRAMES, HEADS),
        3 * [(2 * FRAMES, 6, 80)],
        along_frames(attend),
        {
            "no scale": along_frames(lambda *qkv: attend(*qkv, scale=40**0.5)),
            "the last frame is missed": along_frames(lambda *qkv: attend(*qkv, keys=slice(-1))),
            "a masked tile that is not masked": along_frames(lambda *qkv: attend(*qkv, padded=12)),
            "images in place of frames": attend,
            "no row sums in the gradient": along_frames(without_row_sums),
        },
    ),
    "group_norm_silu": (
        lambda x, w, b, shift: group_norm_silu_reference(x, 2, w, b, shift, 1e-5, 2, True),
        [(4, 8, 3, 5), (8,), (8,), (2, 8)],
        normalise,
        {
            "statistics of an image": lambda *a: normalise(*a, frames=1),
            "no SiLU": lambda *a: normalise(*a, silu=False),
            "the other clip's shift": lambda x, w, b, shift: normalise(x, w, b, shift.flip(0)),
        },
    ),
    "layer_norm": (
        lambda x, w, b, code: layer_norm_reference(x, w, b, code, 1e-5),
        [(4, 5, 40), (40,), (40,), (2, 40)],
        normalise_tokens,
        {
            "the last number is missed": lambda *a: normalise_tokens(*a, drop=1),
            "the other frame's code": lambda *a: normalise_tokens(*a, roll=1),
        },
    ),
    "geglu": (
        geglu_reference,
        [(3, 5, 48)],
        gate,
        {
            "gates before values": lambda x: gate(x, swapped=True),
            "no factor of a half": lambda x: 2 * gate(x),
        },
    ),
    "linear_geglu": (
        linear_geglu_reference,
        [(2, 9, 320), (48, 320), (48,)],
        lambda x, w, b: gate(F.linear(x, w, b)),
        {
            "the last term of the sum is missed": lambda x, w, b: gate(F.linear(x[..., :-1], w[:, :-1], b)),
            "no bias": lambda x, w, b: gate(F.linear(x, w) + 0 * b),
            "the bias of the next column": lambda x, w, b: gate(F.linear(x, w, b.roll(1))),
        },
    ),
}
IN_FLOAT32 = {  # what is too small to see in 16 bits
    "geglu": {"the tanh formula": lambda x: gate(x, approximate="tanh")},
    "group_norm_silu": {
        "a hundredfold eps": lambda *a: normalise(*a, eps=1e-3),
        "one less in the variance": lambda *a: normalise(*a, unbiased=True),
    },
    "layer_norm": {"one less in the variance": lambda *a: normalise_tokens(*a, unbiased=True)},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLIPS = [(op, slip, dtype) for op in OPS for slip in OPS[op][3] for dtype in DTYPES]
SLIPS += [(op, slip, torch.float32) for op, slips in IN_FLOAT32.items() for slip in slips]


def drawn(op: str, dtype: torch.dtype) -> list[Tensor]:
    x, *others = (torch.randn(shape) for shape in OPS[op][1])
    if "norm" in op:
        x = 3 + x
    if op == "linear_geglu":
        others[0] = others[0] / x.shape[-1] ** 0.5
    return [t.to(dtype) for t in (x, *others)]


@pytest.mark.parametrize("op", OPS)
def test_the_maths_in_float32_is_within_the_bounds(op):
    reference, _, right, _ = OPS[op]
    assert max(errors(right, reference, drawn(op, torch.float32))) <= 1


@pytest.mark.parametrize(("op", "slip", "dtype"), SLIPS, ids=lambda x: str(x).removeprefix("torch."))
def test_a_slip_is_not(op, slip, dtype):
    wrong = (OPS[op][3] | IN_FLOAT32.get(op, {}))[slip]
    assert max(errors(wrong, OPS[op][0], drawn(op, dtype))) > 2


def test_a_variance_that_cancels_is_not():
    """Sum and sum of squares of numbers around 300; a second look at the numbers, or Chan's formula, is within."""
    reference, _, right, _ = OPS["group_norm_silu"]
    x, *others = drawn("group_norm_silu", torch.float32)
    assert max(errors(right, reference, [300 + x, *others])) <= 1
    assert max(errors(lambda *a: normalise(*a, cancel=True), reference, [300 + x, *others])) > 2


def test_one_wrong_number_among_thousands_is_not():
    reference, _, right, _ = OPS["linear_geglu"]

    def wrong(*inputs: Tensor) -> Tensor:
        out = right(*inputs)
        return out + F.pad(1e-3 * out[1:, -1:, -1:].detach(), (23, 0, 8, 0, 1, 0))

    assert max(errors(wrong, reference, drawn("linear_geglu", torch.float32))) > 2
