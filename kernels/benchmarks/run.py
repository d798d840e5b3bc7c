"""Time the operations in the shapes of the network, against every way torch has, and keep the numbers in a CSV.

python kernels/benchmarks/run.py --op temporal_attention --device cuda

A row is one operation, shape, provider, mode, dtype and device. Speed-ups are only written where the result is right:
its error against float64 at most twice that of torch's plain maths in the same dtype, plus 1e-6.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from animatediff_kernels.dispatch import TRITON, Call, device_name
from ops import OPS, OURS, Op, Sizes, call, make_inputs, providers, work
from shapes import CLIPS, Shape, trace

RESULTS = Path(__file__).parent / "results"
MEASURED = Path(__file__).parents[1] / "animatediff_kernels/measured.csv"
KEY = ("op", "clip", "layer", "provider", "mode", "dtype", "device")
SHAPE = tuple(name for name in KEY if name != "provider")
COLUMNS = (
    *KEY,
    *("sizes", "calls", "ms", "ms_20", "ms_80", "tflops", "gbps", "ceiling_share", "peak_mb", "error", "right"),
    *("speedup", "ceiling_tflops", "ceiling_gbps", "threads", "versions", "commit", "date"),
)
NOISE = 1e-6
COTANGENT = 0.25  # sums of a clip's gradients stay within float16
DTYPES = ("float32", "float16", "bfloat16")
MODES = ("fwd", "fwd+bwd")
GPU_REPEATS, L2_BYTES, PAUSE_CYCLES = 50, 2**28, 2_000_000  # a pause of a millisecond
PRINTED = ("provider", "ms", "gbps", "ceiling_share", "error", "right", "speedup")
Row = dict[str, str]


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    for dtype in args.dtype:
        run(args, args.device, getattr(torch, dtype))


def run(args: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    peaks = ceilings(device, dtype)
    print(f"{device_label(device)}: copies at {peaks[1] / 1e9:.4g} GB/s, products at {peaks[0] / 1e12:.4g} TFLOP/s")
    for op in args.op or OPS:
        shapes = [s for clip in args.clip for s in trace(clip) if s.op == op]
        for shape in [s for s in shapes if args.layer in s.layer]:
            for mode in args.mode:
                rows = measure(shape, mode, device, dtype, args, peaks)
                write_rows(args.results / f"{op}.csv", rows, renewed=() if args.provider or args.no_compile else SHAPE)
                for row in rows:
                    print("  " + " ".join(f"{row[name]:<14}" for name in PRINTED), flush=True)
                if args.measured:
                    note_measured(args.table, shape, mode, device, dtype, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(OPS), help="by default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="by default float16 and bfloat16 on CUDA")
    parser.add_argument("--clip", nargs="+", choices=list(CLIPS), default=[c for c in CLIPS if c != "16f-256"])
    parser.add_argument("--layer", default="", help="only shapes whose first layer has this in its name")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--provider", nargs="+", help="by default all: sdpa-…, eager, compile, torch, triton")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--measured", action="store_true", help="also tell the dispatch (measured.csv) what won")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs, measured.csv among them")
    args = parser.parse_args()
    args.table = MEASURED if args.results == RESULTS else args.results / MEASURED.name
    if args.measured and args.provider:
        parser.error("got --measured with --provider, expected one of them: what won is only known of all")
    args.dtype = args.dtype or (["float16", "bfloat16"] if args.device.startswith("cuda") else ["float32"])
    return args


def measure(
    shape: Shape, mode: str, device: str, dtype: torch.dtype, args: argparse.Namespace, peaks: tuple[float, float]
) -> list[Row]:
    """A row for every provider that can do it, with speed-ups if none was left out; other reasons are printed."""
    op, sizes = OPS[shape.op], dict(shape.sizes)
    print(f"{shape.op} {shape.clip} {shape.layer}, {mode}: {describe(sizes)}")
    torch._dynamo.reset()  # it compiles a function for a few shapes only, and then runs it as it is
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    inputs = make_inputs(op, sizes, device, dtype)
    flops, moved = work(op, sizes, mode, dtype)
    one, part = cut(op, sizes, inputs, 0)
    allowed = 2 * error(op.plain(one), op, one, part, mode) + NOISE
    if not math.isfinite(allowed):
        allowed = 0.0  # nothing to compare with: nothing is right
    rows = []
    for provider, function in providers(op, sizes).items():
        if (args.provider and provider not in args.provider) or (args.no_compile and provider == "compile"):
            continue
        try:
            wrong = error(function, op, sizes, inputs, mode)
            timed = call(function, inputs, mode)
            timed()  # compiled once more, now that algorithms need not be deterministic
            peak_mb = peak_memory(timed, device)
            ms = time_call(timed, device)
        except Exception as refusal:  # of many kinds: torch's, dynamo's, Triton's
            print(f"  {provider}: no ({str(refusal).splitlines()[0][:100]})")
            continue
        seconds = ms[0] / 1e3
        rows.append(
            {
                "op": shape.op,
                "clip": shape.clip,
                "layer": shape.layer,
                "provider": provider,
                "mode": mode,
                "dtype": str(dtype)[6:],
                "device": device_label(device),
                "sizes": describe(sizes),
                "calls": str(shape.calls),
                **{name: f"{value:.4g}" for name, value in zip(("ms", "ms_20", "ms_80"), ms, strict=True)},
                "tflops": f"{flops / seconds / 1e12:.4g}",
                "gbps": f"{moved / seconds / 1e9:.4g}",
                "ceiling_share": f"{max(flops / peaks[0], moved / peaks[1]) / seconds:.3f}",
                "peak_mb": peak_mb,
                "error": f"{wrong:.2e}",
                "right": "yes" if wrong <= allowed else "no",
                "speedup": "",
                "ceiling_tflops": f"{peaks[0] / 1e12:.4g}",
                "ceiling_gbps": f"{peaks[1] / 1e9:.4g}",
                **provenance(),
            }
        )
    return rows if args.provider or args.no_compile else with_speedups(rows)


def with_speedups(rows: list[Row]) -> list[Row]:
    """Ours against the fastest right result of torch; nothing where ours is wrong or there is none to compare with."""
    others = [float(row["ms"]) for row in rows if row["provider"] not in OURS and row["right"] == "yes"]
    for row in rows:
        fair = row["provider"] in OURS and row["right"] == "yes" and others
        row["speedup"] = f"{min(others) / float(row['ms']):.2f}" if fair else ""
    return rows


def error(function: Callable, op: Op, sizes: Sizes, inputs: list[torch.Tensor], mode: str) -> float:
    """The largest relative error of the output and of every gradient, against float64; fresh memory is NaN meanwhile.

    Of the first and the last item of the batch, which do not know of the others: the output counts there alone, so the
    gradients of weights are the sums of theirs.
    """
    items = op.items(sizes)
    ends = sorted({0, items - 1})

    def at_ends(out: torch.Tensor) -> torch.Tensor:
        cotangent = torch.zeros_like(out)
        for item in ends:
            cotangent.chunk(items)[item].fill_(COTANGENT)
        return cotangent

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = call(function, inputs, mode, at_ends)()
    finally:
        torch.use_deterministic_algorithms(False)
    exact = []
    for item in ends:
        one, part = cut(op, sizes, inputs, item)
        part = [x.double() for x in part]
        exact.append(call(op.reference(one), part, mode, lambda out: torch.full_like(out, COTANGENT))())
    batched = range(min(1 + op.batched, len(got)))
    pairs = [
        (got[i].chunk(items)[item], of_item[i]) for item, of_item in zip(ends, exact, strict=True) for i in batched
    ]
    pairs += [(got[i], sum(of_item[i] for of_item in exact)) for i in range(len(batched), len(got))]
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def cut(op: Op, sizes: Sizes, inputs: list[torch.Tensor], item: int) -> tuple[Sizes, list[torch.Tensor]]:
    """Sizes and inputs of one independent item."""
    items = op.items(sizes)
    one = sizes | {k: sizes[k] // items for k in ("clips", "images", "rows") if k in sizes}
    return one, [x.chunk(items)[item] if i < op.batched else x for i, x in enumerate(inputs)]


def time_call(function: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Milliseconds: median, 20 % and 80 % quantile; on the CPU, CPU time per thread."""
    if device.startswith("cuda"):
        return quantiles(time_on_gpu(function))
    function()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 500 and len(times) < 100):
        times.append(time_once(function))
    return quantiles(times)


def quantiles(times: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[-1]


def time_on_gpu(function: Callable[[], object]) -> list[float]:
    """Milliseconds of the GPU alone: the L2 cache is emptied, and a pause lets the CPU get ahead."""
    for _ in range(3):
        function()
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(GPU_REPEATS)]
    for start, end in pairs:
        cache.zero_()
        torch.cuda._sleep(PAUSE_CYCLES)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def time_once(function: Callable[[], object]) -> float:
    """Milliseconds of CPU time per thread."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3 / torch.get_num_threads()


def peak_memory(function: Callable[[], object], device: str) -> str:
    """Most megabytes allocated on top of the inputs; "" on the CPU, where torch does not tell."""
    if not device.startswith("cuda"):
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine reaches: FLOP/s of a square matrix product, bytes/s (read and written) of a copy."""
    cuda = device.startswith("cuda")
    side, numbers = (8192, 2**28) if cuda else (1024, 2**24)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    product = time_call(lambda: a @ b, device)[0]
    source = torch.randn(numbers, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)[0]
    return 2 * side**3 / product * 1e3, 2 * source.nbytes / copy * 1e3


def write_rows(
    path: Path,
    rows: Sequence[Row],
    key: Sequence[str] = KEY,
    columns: Sequence[str] = COLUMNS,
    renewed: Sequence[str] = (),
) -> None:
    """Write rows into a CSV sorted by `key`; a row with a known key takes the old one's place.

    renewed: columns; old rows that agree in them with a new one are dropped, as they would be if they failed today.
    """
    table: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            table = {tuple(row[k] for k in key): row for row in csv.DictReader(file)}
    if renewed:
        gone = {tuple(row[k] for k in renewed) for row in rows}
        table = {k: row for k, row in table.items() if tuple(row[c] for c in renewed) not in gone}
    table |= {tuple(row[k] for k in key): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[k] for k in sorted(table))
    os.replace(partial, path)


def note_measured(path: Path, shape: Shape, mode: str, device: str, dtype: torch.dtype, rows: list[Row]) -> None:
    """Put milliseconds of a shape into the dispatch's table: Triton's, and the least of what runs otherwise (in Triton
    apart, too) and of torch's attention kernels, whichever of them torch would choose. Where Triton's is not right, or
    nothing else is, the shape has no row.
    """
    ms = {row["provider"]: float(row["ms"]) for row in rows if row["right"] == "yes"}
    others = [v for provider, v in ms.items() if provider in ("torch", "triton-apart") or provider.startswith("sdpa")]
    op, sizes = OPS[shape.op], dict(shape.sizes)
    (_, count), *rest = op.key(sizes).items()
    call = Call(shape.op, device_name(torch.device(device)), dtype, mode != "fwd", count, tuple(rest))
    with path.open(newline="", encoding="utf-8") as file:
        header, *known = csv.reader(file)
    table = {tuple(row[:6]): row[6:] for row in known}
    table.pop((*call.key, str(count)), None)
    if "triton" in ms and others:
        table[(*call.key, str(count))] = [ms["triton"], min(others)]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *[[*key, *table[key]] for key in sorted(table)]])
    os.replace(partial, path)


def describe(sizes: Sizes) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def device_label(device: str) -> str:
    """The name of a GPU, or of the CPU and what torch uses of it: how fast they are, the ceilings say."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} {cpu_name()} {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device


def cpu_name() -> str:
    """Under Linux its name, family and model (virtual machines name families alone), else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    return "{model name} {cpu family}/{model}".format(**found) if len(found) == 3 else platform.machine()


@functools.cache
def provenance() -> Row:
    return {
        "threads": str(torch.get_num_threads()),
        "versions": f"torch {torch.__version__} triton {'.'.join(map(str, TRITON)) if TRITON else 'none'}",
        "commit": commit(Path(__file__).parents[2]),
        "date": datetime.date.today().isoformat(),
    }


def commit(root: Path) -> str:
    """Of the code that is measured, with "-dirty" where that has changed since; tables of results do not count."""

    if shutil.which("git") is None:
        return "unknown"

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*.csv", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


if __name__ == "__main__":
    main()
