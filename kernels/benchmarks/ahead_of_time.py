"""Compiles every kernel for GPUs that need not be there, exactly as the package would launch it.

`python kernels/benchmarks/ahead_of_time.py sm_80,sm_90 CASE…` makes the calls of `ahead_of_time_cases` on CPU tensors,
each launch replaced by a compilation, and prints what ptxas and cuobjdump report, one JSON object a line. The process
must not have Triton in interpreter mode.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from ahead_of_time_cases import CASES
from animatediff_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(arch: str, kernel, args, options, constants) -> dict:
    """What came of one kernel: registers per thread, bytes of stack (spills) and shared memory, matrix instructions."""
    names = kernel.arg_names[: len(args)]
    ones = {n: 1 for n, a in zip(names, args, strict=True) if type(a) is int and a == 1}
    signature = {
        n: TYPES[a.dtype if isinstance(a, torch.Tensor) else type(a)] for n, a in zip(names, args, strict=True)
    }
    signature |= {n: "constexpr" for n in (*ones, *constants)}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(args)
        if isinstance(a, torch.Tensor) or (type(a) is int and a % 16 == 0)
    }
    values = {(kernel.arg_names.index(n),): v for n, v in (constants | ones).items()}
    target = GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(ASTSource(kernel, signature, values, aligned), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"])),
    }


def compile_case(calls, arch: str) -> list[dict]:
    """Make the calls of a case for `arch`; one report per kernel that they would launch."""
    reports = []

    def run(kernel, programs, *args, warps=4, stages=1, **constants):
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        reports.append(compile_kernel(arch, kernel, args, options, constants))

    launch.run, launch.architecture = run, lambda x: arch
    for call in calls:
        call()
    return reports


if __name__ == "__main__":
    archs, *names = sys.argv[1:]
    for name in names:
        for arch in archs.split(","):
            for report in compile_case(CASES[name], arch):
                print(json.dumps({"case": name} | report), flush=True)
