"""Which kernel is right and fastest on the GPU at hand: tried where a call is first met, and remembered in a file.

A call's class is its operation, dtype, mode, sizes and its number of rows up to a factor of two. All that can compute
it run on the tensors of the first such call: the Triton kernel, torch's default, and for attention each of torch's own
kernels. Right is whose error against float64 is at most twice that of torch's default in the same dtype, plus 1e-6; of
those the fastest is kept. The file holds a table for every GPU, torch, triton and version of the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {  # torch's attention kernels
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
REPEATS = 5
MEMORY = "out of memory"  # in a failure that says nothing of the kernel
TRIES = 3  # at most, in a process, at calls of a class that cannot be compared
NOISE = 1e-6  # relative error of float32 results that nobody is blamed for
Inputs = Sequence[Tensor | None]
Results = list[Tensor]


@dataclass(frozen=True)
class Kernels:
    """All that computes an operation, each a function of the same (*inputs, **options).

    Attributes:
        triton, torch: on the GPU; the reference in plain maths, for float64.
        tail: (inputs, options) -> the inputs of the last independent part, and which part of the output that is.
        attends: whether torch has attention kernels of its own for it.
    """

    triton: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    tail: Callable[[Inputs, Mapping[str, Any]], tuple[Inputs, Any]]
    attends: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return ("torch", "triton", *(SDPA if self.attends else ()))

    def run(self, name: str, inputs: Inputs, options: Mapping[str, Any]) -> Tensor:
        if name == "triton":
            return self.triton(*inputs, **options)
        if name == "torch":
            return self.torch(*inputs, **options)
        with sdpa_kernel(SDPA[name]):
            return self.torch(*inputs, **options)


@dataclass
class Entry:
    """What was found for one class of calls.

    Attributes:
        kernel: the one to use.
        ms: milliseconds of every right one. wrong: why each other one is not to be used.
        call, inputs, options: what was measured, to do it again: the fields of its `dispatch.Call`; shape, strides,
            dtype and need of a gradient of each input; the other arguments.
    """

    kernel: str
    ms: dict[str, float]
    wrong: dict[str, str]
    call: dict[str, Any]
    inputs: list[Any]
    options: dict[str, Any]


tables: dict[str, dict[str, Entry]] = {}  # device, as `Call.place` spells it -> class of calls -> what was found
_lock = threading.RLock()  # a linear layer's gate is measured while the layer is
_in_vain: Counter[tuple[str, str]] = Counter()  # device and class of what could not be compared -> how often
_announced: list[str] = []


def key(call: Any) -> str:
    """The class of a call."""
    op, _, *rest = call.key
    return " ".join([op, *rest, f"rows<{1 << call.rows.bit_length()}"])


def lookup(call: Any) -> Entry | None:
    table = tables.get(call.place)
    return table.get(key(call)) if table else None


def possible(inputs: Inputs) -> bool:
    """Whether these are plain tensors, and neither CUDA nor the compiler is recording a graph."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return False
    return all(x is None or type(x) in (Tensor, nn.Parameter) for x in inputs)


def calibrate(call: Any, kernels: Kernels, inputs: Inputs, options: Mapping[str, Any], *, anew: bool = False) -> None:
    """Measure a call that no table knows, or `anew`, and remember what was found."""
    with _lock:
        load(call.place)
        this = call.place, key(call)
        if (lookup(call) is not None or _in_vain[this] == TRIES) and not anew:
            return
        # what is tried here is none of what gradient checkpointing counts and computes again
        with _on(call.place), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            found = measure(call, kernels, inputs, options)
        if found is None:
            _in_vain[this] += 1
            return
        tables[call.place][key(call)] = found
        _save(call.place)


def measure(call: Any, kernels: Kernels, inputs: Inputs, options: Mapping[str, Any]) -> Entry | None:
    """Try all kernels; None where none could be compared: torch's own result is not finite, or there is not the memory
    for a second one.
    """
    tail, part = kernels.tail(inputs, options)
    tail = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in tail]
    try:
        exact = _results(kernels.reference, [x if x is None else _double(x) for x in tail], options, call.grad)
    except RuntimeError:  # no memory, as torch or cuBLAS tell it
        return None
    errors, ms, wrong = {}, {}, {}
    for name in kernels.names:
        function = functools.partial(_call, kernels, name)
        try:
            with torch.no_grad():
                whole = function(*inputs, **options)[part]
            got = [whole, *_results(function, tail, options, call.grad)[1:]]
            errors[name] = max(_relative_error(a, b) for a, b in zip(got, exact, strict=True))
            ms[name] = milliseconds(lambda f=function: _results(f, inputs, options, call.grad))
        except Exception as failure:  # no such kernel for these sizes, a compiler's refusal or none, no memory
            wrong[name] = (str(failure) or type(failure).__name__).strip().splitlines()[0][:100]
    allowed = 2 * errors.get("torch", math.inf) + NOISE
    if not math.isfinite(allowed):
        return None
    for name in [n for n in ms if not errors[n] <= allowed]:
        del ms[name]
        wrong[name] = f"error {errors[name]:.1e}, expected at most {allowed:.1e}"
    if not ms:
        return None
    described = [
        x if x is None else [list(x.shape), list(x.stride()), str(x.dtype)[6:], x.requires_grad] for x in inputs
    ]
    fields = asdict(call) | {"dtype": str(call.dtype)[6:], "shape": dict(call.shape)}
    return Entry(min(ms, key=ms.__getitem__), ms, wrong, fields, described, dict(options))


def _on(place: str) -> contextlib.AbstractContextManager:
    """The device whose clock is read."""
    return torch.cuda.device(place) if place.startswith("cuda") else contextlib.nullcontext()


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU, after a first one that may compile."""
    function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def _call(kernels: Kernels, name: str, *inputs: Tensor | None, **options: Any) -> Tensor:
    return kernels.run(name, inputs, options)


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def _results(function: Callable[..., Tensor], inputs: Inputs, options: Mapping[str, Any], grad: bool) -> Results:
    """The output, then, with `grad`, the gradients of the inputs that need one."""
    if not grad:
        with torch.no_grad():
            return [function(*inputs, **options)]
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        out = function(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None and x.requires_grad], out)]


def _relative_error(got: Tensor, exact: Tensor) -> float:
    error = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
    return error if math.isfinite(error) else math.inf


def show(place: str = "cuda:0", *, remeasure: bool = False, tell: Callable[[str], None] = print) -> None:
    """Tell what the table of a GPU holds; with `remeasure` every class in it is timed again, on random numbers."""
    if not torch.cuda.is_available() and place.startswith("cuda"):
        return tell("there is no CUDA device here: torch's own kernels run")
    table = load(place)
    tell(f"{environment(place)}: {len(table)} classes of calls in {path()}")
    for name, entry in sorted(table.items()):
        if remeasure:
            _again(entry, place)
        entry = table[name]
        timed = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in sorted(entry.ms.items(), key=lambda pair: pair[1]))
        unfit = "".join(f"; {kernel}: {why}" for kernel, why in entry.wrong.items())
        tell(f"{name}: {entry.kernel} ({timed}{unfit})")


def _again(entry: Entry, place: str) -> None:
    from animatediff_kernels.dispatch import Call

    generator, inputs = torch.Generator(place).manual_seed(0), []
    for described in entry.inputs:
        if described is None:
            inputs.append(None)
            continue
        shape, strides, dtype, grad = described
        x = torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=place)
        inputs.append(x.normal_(generator=generator).requires_grad_(grad))
    fields = entry.call | {
        "dtype": getattr(torch, entry.call["dtype"]),
        "shape": tuple(entry.call["shape"].items()),
        "place": place,
    }
    kernels = importlib.import_module(f"animatediff_kernels.{entry.call['op']}").KERNELS
    calibrate(Call(**fields), kernels, inputs, entry.options, anew=True)


# The file


def path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "animatediff" / "kernels.json"


def environment(place: str) -> str:
    """What a table holds for: GPU, torch, triton, and the sources of the kernels."""
    gpu = torch.cuda.get_device_name(place) if torch.cuda.is_available() else place
    return f"{gpu}, torch {torch.__version__}, triton {_triton()}, kernels {_sources()}"


@functools.cache
def _triton() -> str:
    from animatediff_kernels.dispatch import TRITON

    return ".".join(map(str, TRITON)) if TRITON else "none"


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def load(place: str) -> dict[str, Entry]:
    """The table of a device, from memory or from the file. Call it before torch.compile, which may read no files."""
    with _lock:
        if place not in tables:
            tables[place] = {k: Entry(**entry) for k, entry in _read().get(environment(place), {}).items()}
        return tables[place]


def forget() -> None:
    """Leave what is in memory; what is in the file is read again."""
    with _lock:
        tables.clear()
        _in_vain.clear()


def _read() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        for table in found.values():
            for entry in table.values():
                Entry(**entry)
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _tell(f"{path()} cannot be read ({type(error).__name__}): kernels are timed again")
        return {}


def _save(place: str) -> None:
    """Put the table of a device into the file, beside what other processes put there since."""
    name = environment(place)
    _tell(f"timing kernels on {name.split(', torch')[0]} where it meets them first; remembered in {path()}")
    everything = _read()
    lasting = {k: asdict(e) for k, e in tables[place].items() if not any(MEMORY in why for why in e.wrong.values())}
    everything[name] = everything.get(name, {}) | lasting
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path()) as file:
            json.dump(everything, file, indent=1, sort_keys=True)
    except OSError as error:
        _tell(f"{path()} cannot be written ({error.strerror}): kernels are timed again next time")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Any]:
    """A file that takes the place of `target` when it is complete."""
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
        try:
            yield file
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, target)


def _tell(line: str) -> None:
    """Once in a process."""
    if line not in _announced:
        _announced.append(line)
        print(line, file=sys.stderr)
