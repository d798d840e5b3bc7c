"""Every kernel compiles for GPUs that are not there: nothing spills, registers and shared memory fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from animatediff_kernels.dispatch import triton_missing

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from ahead_of_time_cases import CASES  # noqa: E402

pytestmark = pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
KIB = 1024
SHARED = {  # bytes a program may have
    "sm_80": 163 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
}
BUDGET = {  # registers per thread of every width in 16 bits, where several programs must share a multiprocessor
    ("temporal13", "forward_kernel"): 80,
    ("temporal13", "backward_kernel"): 120,
    ("temporal16", "forward_kernel"): 80,
    ("temporal16", "backward_kernel"): 120,
    ("temporal32", "forward_kernel"): 128,
    ("temporal32", "backward_kernel"): 184,
    ("text77", "single_pass_kernel"): 184,
    ("others", "geglu_kernel"): 48,
    ("others", "apply_kernel"): 96,
    ("one-group", "merge_kernel"): 80,
}
PLAIN = ("others", "one-group")  # without matrix products
PRODUCTS = {"forward_kernel": 2, "backward_kernel": 5}  # of matrices, in temporal attention
FLOAT32_STACK = 512  # bytes of the kernels that multiply in three passes, to be right rather than fast


def compiled(archs: str, *cases: str) -> list[dict]:
    """One report per kernel and architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "ahead_of_time.py"), archs, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def most_matrix_instructions(case: str, kernel: str) -> int:
    """Of a warp of temporal attention: its 16 queries times all keys, 16 x 8 x 16 at once. Above, warps repeat work."""
    operation, dim, *_, dtype = case.split("-")
    frames, width = max(16, int(operation.removeprefix("temporal"))), -(-int(dim) // 16) * 16
    return PRODUCTS[kernel] * frames * width // 128 * (6 if dtype == "float32" else 1)


def check(reports: list[dict]) -> None:
    """Nothing spills but a little in float32, everything fits; in temporal attention no warp repeats another's work."""
    for report in reports:
        case, kernel = report["case"], report["kernel"]
        wide = case.endswith("-float32")
        most = FLOAT32_STACK if wide and not case.startswith("gated") else 0
        assert report["stack"] <= most, f"spills: {report}"
        family = case if case in PLAIN else case.split("-")[0]
        budget = 255 if wide else BUDGET.get((family, kernel), 255)
        assert report["registers"] <= budget, f"registers: {report}"
        assert report["shared"] <= SHARED[report["arch"]], f"shared memory: {report}"
        assert report["matrix"] > 0 or case in PLAIN, f"no matrix instructions: {report}"
        if case.startswith("temporal"):
            assert report["matrix"] <= most_matrix_instructions(case, kernel), f"warps repeat work: {report}"


@pytest.mark.parametrize(
    ("arch", "cases", "kernels"),
    [
        pytest.param(
            "sm_80",
            ("text77-160-bfloat16", "temporal16-80-bfloat16", "one-group"),
            8,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sm_89",
            ("others", "attention-80-masked-float16", "temporal32-160-bfloat16", "temporal16-40-float32"),
            16,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sm_90", ("attention-40-bfloat16", "temporal16-80-bfloat16", "gated-40-bfloat16"), 6, marks=pytest.mark.slow
        ),
        ("sm_90", ("temporal16-40-bfloat16",), 2),
    ],
)
def test_one_case_of_every_width(arch, cases, kernels):
    reports = compiled(arch, *cases)
    assert len(reports) == kernels
    check(reports)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_every_level(arch):
    check(compiled(arch, *CASES))
