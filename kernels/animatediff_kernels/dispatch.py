"""Which kernel computes an operation: torch's own, or the Triton kernels of this package.

A request comes from the argument `backend=`, else from `use_backend`, else from the environment variable
ANIMATEDIFF_KERNELS, else it is "auto". Under "auto" the table of this GPU decides (`calibration.py`, which measures
what the table does not know), then `measured.csv`, the committed measurements of known architectures; what nobody
measured is torch's. A request for "triton" that cannot be met raises.
"""

from __future__ import annotations

import csv
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from animatediff_kernels import calibration
from animatediff_kernels.calibration import Inputs, Kernels

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT = "ANIMATEDIFF_KERNELS"
OLDEST_TRITON = (3, 6)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_SM = 80  # bfloat16 matrix instructions and asynchronous copies begin with Ampere
LIMITS = {  # what a kernel takes, both ends included; shape entries without a row have no limit
    "temporal_attention": {"frames": (1, 64), "head_dim": (4, 160)},
    "attention": {"head_dim": (4, 160)},
    "layer_norm": {"width": (1, 4096)},
    "linear_geglu": {"width": (1, 8192), "inner": (1, 32_768)},  # offsets into the weights have 32 bits
}
FLOAT32_FRAMES = 32  # more of them do not fit the registers

SIZES = {  # of `Call.shape`, in order
    "temporal_attention": ("frames", "head_dim"),
    "attention": ("head_dim", "tokens", "keys", "shared"),  # tokens of an image that attends to itself, else the text's
    "group_norm_silu": ("channels", "images", "silu", "shift", "channels_last"),
    "layer_norm": ("width", "code"),
    "geglu": ("width",),
    "linear_geglu": ("width", "inner"),
}


def installed_triton() -> tuple[int, ...] | None:
    """Its version, without importing it."""
    for name in ("triton", "triton-windows", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            return tuple(int(part) for part in version(name).split(".")[:2])
    return None


TRITON = installed_triton()

_requested: list[list[str]] = []  # by use_backend, of the whole process, because backward runs in threads of its own
_lock = threading.Lock()


used: dict[Call, str] = {}  # the kernel that computed a call last


class Choice(NamedTuple):
    backend: str  # "torch", "triton", or one of torch's attention kernels: calibration.SDPA
    reason: str


@dataclass(frozen=True)
class Call:
    """All that a choice depends on.

    Attributes:
        op: name of the operation.
        device: "sm_90" and the like for NVIDIA GPUs, "interpreter" for CPU tensors under TRITON_INTERPRET=1, else
            torch's device type.
        dtype: of all activations; None where they differ.
        grad: whether a backward pass will follow.
        rows: how much of it there is, in tokens of all images. A choice holds between two measured numbers of rows.
        shape: the other sizes that decide which backend is faster, in the operation's own order.
        place: the device as torch spells it, whose table decides.
    """

    op: str
    device: str
    dtype: torch.dtype | None
    grad: bool
    rows: int
    shape: tuple[tuple[str, int], ...]
    place: str = field(default="", compare=False)

    @staticmethod
    def of(
        op: str,
        *tensors: Tensor,
        rows: int,
        weights: Sequence[Tensor] = (),
        dtype: torch.dtype | None = None,
        **shape: int,
    ) -> Call:
        """The call of `op` on these activations; `weights` may be of another dtype, as they are under autocast.

        dtype: that the operation computes in, if not that of the activations.
        """
        first = tensors[0]
        return Call(
            op,
            device_name(first.device),
            dtype or (first.dtype if all(t.dtype == first.dtype for t in tensors) else None),
            torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *weights)),
            rows,
            tuple(shape.items()),
            str(first.device),
        )

    @property
    def key(self) -> tuple[str, ...]:
        """The first columns of the call's rows in `measured.csv`: op, arch, dtype, mode, shape."""
        shape = " ".join([f"{name}={size}" for name, size in self.shape])
        return self.op, self.device, str(self.dtype).removeprefix("torch."), "train" if self.grad else "forward", shape


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_name(device: torch.device) -> str:
    """A device as `Call.device` spells it."""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{10 * major + minor}"
    return "interpreter" if device.type == "cpu" and interpreting() else device.type


def read_measurements(path: Path) -> dict[tuple[str, ...], dict[int, tuple[float, float]]]:
    """`Call.key` -> number of rows -> milliseconds (triton, best of torch)."""
    with path.open(newline="", encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    found: dict[tuple[str, ...], dict[int, tuple[float, float]]] = {}
    for *key, rows, triton, own in lines:
        found.setdefault(tuple(key), {})[int(rows)] = float(triton), float(own)
    return found


MEASURED = read_measurements(Path(__file__).with_name("measured.csv"))


def triton_missing() -> str | None:
    """Why there is no triton to use, or None."""
    if TRITON is None:
        return "triton is not installed"
    if TRITON < OLDEST_TRITON:
        return f"triton {'.'.join(map(str, TRITON))} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def refusal(call: Call) -> str | None:
    """Why the Triton kernels cannot do this, or None."""
    if (reason := triton_missing()) is not None:
        return reason
    if call.device == "cpu":
        return "the tensors are on the CPU, the kernels run on NVIDIA GPUs (or, for tests, under TRITON_INTERPRET=1)"
    if call.device != "interpreter" and not call.device.startswith("sm_"):
        return f"the kernels run on NVIDIA GPUs, not on {call.device}"
    if call.device.startswith("sm_") and int(call.device[3:]) < OLDEST_SM:
        return f"{call.device} is older than sm_{OLDEST_SM}"
    if call.dtype is None:
        return "the tensors differ in dtype"
    if call.dtype not in DTYPES:
        return f"{call.dtype} is none of float32, float16, bfloat16"
    if call.dtype == torch.float32 and dict(call.shape).get("frames", 0) > FLOAT32_FRAMES:
        return f"float32 takes at most {FLOAT32_FRAMES} frames"
    for name, size in call.shape:
        low, high = LIMITS.get(call.op, {}).get(name, (size, size))
        if not low <= size <= high:
            return f"{name} {size} is outside {low} … {high}"
    return None


def auto(call: Call) -> Choice:
    """What "auto" means for a call."""
    reason = refusal(call)
    if reason is not None:
        return Choice("torch", reason)
    if call.device == "interpreter":
        return Choice("torch", "the interpreter is for tests")
    if (entry := calibration.lookup(call)) is not None:
        return Choice(entry.kernel, "timed here: " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in entry.ms.items()))
    return committed(call) or Choice("torch", "not timed yet on this GPU")


def committed(call: Call) -> Choice | None:
    """What `measured.csv` says, if anything."""
    measured = MEASURED.get(call.key, {})
    fewer, more = [n for n in measured if n <= call.rows], [n for n in measured if n >= call.rows]
    if not fewer:  # with few rows a launch costs more than the work: the larger measurement says nothing
        return None
    near = [max(fewer), *([min(more)] if more else [])]
    shares = [measured[n][0] / measured[n][1] for n in near]
    rows = near[shares.index(max(shares))]  # where triton does worse
    triton, own = measured[rows]
    reason = f"measured at {rows} rows: triton {triton:g} ms, torch {own:g} ms"
    return Choice("triton" if triton < own else "torch", reason)


def run(call: Call, backend: str | None, kernels: Kernels, inputs: Inputs, **options: Any) -> Tensor:
    """Compute a call with the kernel that is chosen for it; under "auto" on a GPU, after measuring what is not known.

    Args:
        inputs: of the functions in `kernels`, with `options`.
    Raises: ValueError where "triton" is asked for and cannot be had.
    """
    if calibration.possible(inputs) and (backend or requested()) == "auto" and worth_measuring(call):
        calibration.calibrate(call, kernels, inputs, options)
    choice = choose(call, backend)
    if not torch.compiler.is_compiling():
        used[call] = choice.backend
    return kernels.run(choice.backend, inputs, options)


def worth_measuring(call: Call) -> bool:
    """Whether nothing is known of a call that a GPU's kernels can do."""
    known = refusal(call) or call.device == "interpreter" or calibration.lookup(call) or committed(call)
    return not known


def provenance() -> Mapping[str, str]:
    """Class of calls -> the kernel that computed it, of all that ran in this process outside of compiled code."""
    return dict(sorted((calibration.key(call), kernel) for call, kernel in used.items()))


def requested() -> str:
    """The backend asked for by `use_backend` or the environment."""
    return _requested[-1][0] if _requested else _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def choose(call: Call, backend: str | None = None) -> Choice:
    """The backend of a call and why. Raises ValueError where "triton" was asked for and cannot be had."""
    backend = requested() if backend is None else _known(backend, "backend")
    if backend == "auto":
        return auto(call)
    if backend == "triton":
        reason = refusal(call)
        if reason is not None:
            raise ValueError(f'{call.op}: backend "triton" was asked for, but {reason}; ask for "auto" or "torch"')
    return Choice(backend, "asked for")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within it every operation runs on `backend`: "auto", "torch" or "triton".

    It holds for the whole process; of several threads the last to enter is heard. Call `backward` within it too where
    activations are checkpointed: recomputing a block asks again.
    """
    asked = [_known(backend, "backend")]
    with _lock:
        _requested.append(asked)
    try:
        yield
    finally:
        with _lock:
            _requested[:] = [other for other in _requested if other is not asked]


def _known(backend: str, name: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"got {name}={backend!r}, expected one of {', '.join(BACKENDS)}")
    return backend
