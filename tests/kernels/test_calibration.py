"""Kernels that are measured where they run, on a GPU that is made up: Triton's interpreter and a clock of our own."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from animatediff_kernels import (
    attention,
    calibration,
    dispatch,
    explain,
    geglu,
    group_norm_silu,
    layer_norm,
    linear_geglu,
    provenance,
    temporal_attention,
    use_backend,
)
from animatediff_kernels.calibration import Kernels
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The CPU as an sm_90 whose kernels take the milliseconds of this dict, and the list of all that was timed."""
    clock, timed, started = {"triton": 1.0, "torch": 2.0, "flash": 3.0}, [], []
    real = Kernels.run
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "used", {})
    monkeypatch.setattr(calibration, "tables", {})
    monkeypatch.setattr(calibration, "_announced", [])
    monkeypatch.setattr(calibration, "_in_vain", Counter())
    monkeypatch.setattr(Kernels, "run", lambda self, name, *args: started.append(name) or real(self, name, *args))

    def milliseconds(function):
        before = len(started)
        function()
        timed.append(started[before])
        return clock[timed[-1]]

    monkeypatch.setattr(calibration, "milliseconds", milliseconds)
    return clock, timed


def table(tmp_path) -> dict:
    [only] = json.loads((tmp_path / "animatediff/kernels.json").read_text()).values()
    return only


def test_gradient_checkpointing_while_kernels_are_tried(gpu):
    def block(x):
        return layer_norm(geglu(x), torch.ones(4), torch.zeros(4))

    x = torch.randn(2, 3, 8, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    block(again).square().sum().backward()
    assert torch.allclose(x.grad, again.grad, atol=1e-5)


def test_the_fastest_is_kept_and_remembered(gpu, tmp_path, capsys):
    clock, timed = gpu
    x = torch.randn(2, 3, 8)
    expected = geglu(x, backend="torch")
    for _ in range(3):
        assert torch.allclose(geglu(x), expected, atol=1e-6)
    assert timed == ["torch", "triton"] and list(provenance().values()) == ["triton"]
    clock["triton"] = 9.0  # what a table says holds, however fast this machine is today
    calibration.forget()
    geglu(x)
    explain("geglu", rows=6, device=torch.device("cpu"), width=4)
    assert timed == ["torch", "triton"] and list(provenance().values()) == ["triton"]
    assert table(tmp_path)["geglu float32 forward width=4 rows<8"]["ms"] == {"torch": 2.0, "triton": 1.0}
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and told.err.startswith("timing kernels on cpu where it meets them first")
    assert "triton, timed here: torch 2 ms, triton 1 ms" in told.out


CALLS = {
    "attention": lambda *x: attention(*x, num_heads=2),
    "temporal_attention": lambda *x: temporal_attention(*x, frames=2, num_heads=2),
    "group_norm_silu": lambda *x: group_norm_silu(x[0], 2, *x[1:3], eps=1e-5, frames=2, shift=x[3]),
    "layer_norm": lambda *x: layer_norm(*x[:3], code=x[3]),
    "linear_geglu": linear_geglu,
    "geglu": geglu,
}
SHAPES = {
    "attention": ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
    "temporal_attention": 3 * ((4, 5, 8),),
    "group_norm_silu": ((4, 8, 3, 3), (8,), (8,), (2, 8)),
    "layer_norm": ((4, 5, 8), (8,), (8,), (2, 8)),
    "linear_geglu": ((4, 5, 8), (24, 8), (24,)),
    "geglu": ((4, 5, 8),),
}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op", CALLS)
def test_every_operation_is_measured_and_its_kernel_is_right(gpu, tmp_path, op, grad):
    inputs = [torch.randn(shape, requires_grad=grad) for shape in SHAPES[op]]
    found = CALLS[op](*inputs)
    with use_backend("torch"):
        assert torch.allclose(found, CALLS[op](*inputs), atol=1e-5)
    mode = "train" if grad else "forward"
    entry = next(entry for name, entry in table(tmp_path).items() if name.startswith(f"{op} float32 {mode}"))
    assert entry["kernel"] == "triton" and {"torch", "triton"} <= entry["ms"].keys()
    assert op not in ("attention", "temporal_attention") or {"efficient", "cudnn"} == entry["wrong"].keys()


def test_torch_s_own_attention_kernels_are_tried_too(gpu):
    clock, timed = gpu
    clock["flash"] = 0.5
    x = torch.randn(2, 5, 8)
    attention(x, x, x, num_heads=2)
    assert timed == ["torch", "triton", "flash"] and list(provenance().values()) == ["flash"]


def slips():
    from animatediff_kernels.geglu.op import geglu_op

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return geglu_op(x)

        @staticmethod
        def backward(ctx, dy):
            return torch.cat([dy, dy], -1)

    def last_number(x):
        y = geglu_op(x).clone()
        y[..., -1] = 0
        return y

    return {
        "a wrong number": (last_number, False, "error "),
        "unwritten memory": (lambda x: geglu_op(x) * torch.nan, False, "error inf, expected at most"),
        "a wrong gradient": (WrongGradient.apply, True, "error "),
        "a failure": (
            raises(RuntimeError("no kernel image is available\nfor this device")),
            False,
            "no kernel image is available",
        ),
    }


def raises(failure: Exception):
    def kernel(*args, **options):
        raise failure

    return kernel


@pytest.mark.parametrize("slip", ["a wrong number", "unwritten memory", "a wrong gradient", "a failure"])
def test_a_fast_kernel_that_is_wrong_is_not_used(gpu, monkeypatch, slip):
    triton, grad, why = slips()[slip]
    module = sys.modules["animatediff_kernels.geglu"]
    monkeypatch.setattr(module, "KERNELS", replace(module.KERNELS, triton=triton))
    x = torch.randn(2, 3, 8, requires_grad=grad)
    assert torch.equal(geglu(x), geglu(x, backend="torch"))
    [entry] = calibration.tables["cpu"].values()
    assert entry.kernel == "torch" and list(entry.ms) == ["torch"] and entry.wrong["triton"].startswith(why)


def test_what_cannot_be_compared_is_not_remembered(gpu, tmp_path):
    x = torch.randn(2, 3, 8)
    assert geglu(x * torch.nan).isnan().all() and not (tmp_path / "animatediff").exists()
    geglu(x)
    assert list(provenance().values()) == ["triton"]


def test_what_can_never_be_compared_is_tried_three_times(gpu, monkeypatch):
    measured, real = [], calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda call, *rest: measured.append(call) or real(call, *rest))
    for _ in range(5):
        geglu(torch.full((2, 3, 8), torch.nan))
    assert len(measured) == 3


def test_no_memory_for_the_comparison(gpu, monkeypatch):
    """In float64 the call is computed as if there were no kernels; it is tried again."""
    module = sys.modules["animatediff_kernels.geglu"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "KERNELS", replace(module.KERNELS, reference=raises(torch.OutOfMemoryError("CUDA"))))
        geglu(torch.randn(2, 3, 8))
        assert calibration.tables["cpu"] == {} and list(provenance().values()) == ["torch"]
    geglu(torch.randn(2, 3, 8))
    assert list(provenance().values()) == ["triton"]


def test_no_memory_to_time_any_kernel(gpu, monkeypatch):
    def milliseconds(function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "milliseconds", milliseconds)
        geglu(torch.randn(2, 3, 8))
    assert calibration.tables["cpu"] == {} and list(provenance().values()) == ["torch"]


def test_no_memory_for_a_kernel_is_not_remembered_beyond_this_process(gpu, monkeypatch, tmp_path):
    module = sys.modules["animatediff_kernels.geglu"]
    failure = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(module, "KERNELS", replace(module.KERNELS, triton=raises(failure)))
    geglu(torch.randn(2, 3, 8))
    [entry] = calibration.tables["cpu"].values()
    assert entry.kernel == "torch" and entry.wrong["triton"].startswith("CUDA out of memory") and table(tmp_path) == {}


@pytest.mark.parametrize(
    "failure",
    [
        subprocess.CalledProcessError(1, "gcc"),
        AssertionError("libcuda.so cannot found!"),
        PermissionError(13, "Permission denied"),
        ImportError("undefined symbol"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_kernel_that_cannot_be_built_is_not_used(gpu, monkeypatch, failure):
    module = sys.modules["animatediff_kernels.geglu"]
    monkeypatch.setattr(module, "KERNELS", replace(module.KERNELS, triton=raises(failure)))
    x = torch.randn(2, 3, 8)
    assert torch.equal(geglu(x), geglu(x, backend="torch"))
    [entry] = calibration.tables["cpu"].values()
    assert entry.kernel == "torch" and entry.wrong["triton"]


def test_rows_count_up_to_a_factor_of_two(gpu):
    _, timed = gpu
    for rows in (4, 5, 7):
        geglu(torch.randn(rows, 8))
    assert len(timed) == 2
    geglu(torch.randn(8, 8))
    geglu(torch.randn(8, 10))
    geglu(torch.randn(8, 10, requires_grad=True))
    assert len(timed) == 8


def test_nothing_is_measured_where_a_backend_is_asked_for(gpu, monkeypatch):
    _, timed = gpu
    x = torch.randn(2, 3, 8)
    geglu(x, backend="torch")
    with use_backend("triton"):
        geglu(x)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "torch")
    geglu(x)
    assert timed == []


def test_committed_measurements_need_no_others(gpu, monkeypatch):
    _, timed = gpu
    monkeypatch.setattr(dispatch, "MEASURED", {("geglu", "sm_90", "float32", "forward", "width=4"): {6: (1.0, 2.0)}})
    geglu(torch.randn(2, 3, 8))
    assert timed == [] and list(provenance().values()) == ["triton"]


def test_nothing_is_measured_while_a_graph_is_recorded(gpu, monkeypatch):
    _, timed = gpu
    x = torch.randn(2, 3, 8)
    compiled = torch.compile(lambda x: geglu(x), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), geglu(x, backend="torch")) and timed == []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        geglu(x)
    assert timed == [] and set(provenance().values()) == {"torch"}
    geglu(x)
    assert timed == ["torch", "triton"]


def test_compiled_code_takes_what_the_table_says(gpu):
    x = torch.randn(2, 3, 8)
    geglu(x)
    graphs = []
    whole = torch.compile(
        lambda x: geglu(x), fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph.forward
    )
    whole(x)
    assert "animatediff" in graphs[0]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": {"b": {"kernel": "triton"}}}', '{"a": 3}'])
def test_a_broken_file_is_told_of_and_written_anew(gpu, tmp_path, capsys, content):
    file = tmp_path / "animatediff/kernels.json"
    file.parent.mkdir()
    file.write_text(content)
    geglu(torch.randn(2, 3, 8))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "kernels.json cannot be read" in told[0] and len(table(tmp_path)) == 1
    assert [f.name for f in file.parent.iterdir()] == ["kernels.json"]


def test_a_folder_that_cannot_be_written_is_told_of_once(gpu, tmp_path, capsys):
    (tmp_path / "animatediff").write_text("a file in its place")
    for rows in (2, 9):
        geglu(torch.randn(rows, 8))
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(told) == 1 and list(provenance().values()) == ["triton", "triton"]


def test_tables_of_others_stay(gpu, monkeypatch, tmp_path):
    """Of another GPU or version, and what another process has added since this one read the file."""
    _, timed = gpu
    x = torch.randn(2, 3, 8)
    geglu(x)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "environment", lambda place: "another GPU")
        calibration.forget()
        geglu(x)
    assert len(timed) == 4
    file = tmp_path / "animatediff/kernels.json"
    everything = json.loads(file.read_text())
    everything["another GPU"]["geglu of another process"] = everything["another GPU"].popitem()[1]
    file.write_text(json.dumps(everything))
    calibration.forget()
    geglu(torch.randn(9, 8))
    names = {name: len(entries) for name, entries in json.loads(file.read_text()).items()}
    assert names.pop("another GPU") == 1 and list(names.values()) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "train"])
def test_the_table_is_shown_and_measured_again(gpu, capsys, grad):
    clock, _ = gpu
    for op, call in CALLS.items():
        call(*[torch.randn(shape, requires_grad=grad) for shape in SHAPES[op]])
    clock["triton"] = 9.0
    lines = []
    calibration.show("cpu", tell=lines.append)
    assert {line.split()[0] for line in lines[1:]} == set(CALLS) and all(
        ": triton (triton 1 ms, " in line for line in lines[1:]
    )
    calibration.show("cpu", remeasure=True, tell=lines.append)
    assert all(entry.kernel == "torch" and entry.ms["triton"] == 9.0 for entry in calibration.tables["cpu"].values())
