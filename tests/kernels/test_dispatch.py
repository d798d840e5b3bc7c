"""Which backend a call gets, and why."""

import subprocess
import sys

import pytest
import torch
from animatediff_kernels import dispatch, explain, temporal_attention, use_backend
from animatediff_kernels.dispatch import Call, auto, choose, read_measurements, refusal


def call(op="temporal_attention", device="sm_90", dtype=torch.bfloat16, grad=False, **shape):
    return Call(op, device, dtype, grad, tuple((shape or {"frames": 16, "head_dim": 40}).items()))


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


REFUSALS = [
    pytest.param(call(device="cpu"), "on the CPU", id="cpu"),
    pytest.param(call(device="mps"), "not on mps", id="another device"),
    pytest.param(call(device="sm_75"), "sm_75 is older than sm_80", id="an old GPU"),
    pytest.param(call(dtype=None), "differ in dtype", id="mixed dtypes"),
    pytest.param(call(dtype=torch.float64), "float64 is none of", id="dtype"),
    pytest.param(call("guided_ddim", grad=True, elements=4), "no backward kernel", id="backward"),
    pytest.param(call(frames=65, head_dim=40), "frames 65 is outside 1 … 64", id="frames"),
    pytest.param(call(frames=16, head_dim=168), "head_dim 168 is outside 4 … 160", id="temporal head width"),
    pytest.param(call(dtype=torch.float32, frames=33, head_dim=40), "at most 32 frames", id="float32 frames"),
    pytest.param(call("attention", tokens=64, keys=64, head_dim=512), "head_dim 512 is outside", id="head width"),
    pytest.param(call("layer_norm", width=8192), "width 8192 is outside", id="norm width"),
]


@pytest.mark.parametrize(("bad", "reason"), REFUSALS)
def test_refusals(bad, reason):
    assert reason in refusal(bad)
    assert auto(bad).backend == "torch" and reason in auto(bad).reason
    with pytest.raises(ValueError, match='backend "triton" was asked for, but .*' + reason):
        choose(bad, "triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert auto(call()) == ("torch", "triton is not installed")


def test_auto_follows_the_measured_table(monkeypatch, tmp_path):
    table = tmp_path / "measured.csv"
    table.write_text(
        "op,arch,dtype,mode,shape,triton_ms,torch_ms\n"
        "temporal_attention,sm_90,bfloat16,forward,frames=16 head_dim=40,0.1,0.5\n"
        "temporal_attention,sm_90,bfloat16,train,frames=16 head_dim=40,0.9,0.5\n"
    )
    monkeypatch.setattr(dispatch, "MEASURED", read_measurements(table))
    assert auto(call()) == ("triton", "measured: triton 0.1 ms, torch 0.5 ms")
    assert auto(call(grad=True)) == ("torch", "measured: triton 0.9 ms, torch 0.5 ms")
    for other in (call(device="sm_89"), call(dtype=torch.float16), call(frames=8, head_dim=40)):
        assert auto(other) == ("torch", "no measurement says that triton is faster here")


def test_the_committed_table_is_readable():
    assert all(len(row) == 5 and min(times) > 0 for row, times in dispatch.MEASURED.items())


def test_who_asks_last_is_heard_first(monkeypatch):
    assert choose(call()).backend == "torch"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert choose(call()) == ("triton", "asked for")
    with use_backend("torch"):
        assert choose(call()).backend == "torch"
        assert choose(call(), "triton").backend == "triton"
        with use_backend("auto"):
            assert choose(call()) == auto(call())
    assert choose(call()).backend == "triton"


def test_unknown_backends(monkeypatch):
    expected = "got {}='cuda', expected one of auto, torch, triton"
    with pytest.raises(ValueError, match=expected.format("backend")), use_backend("cuda"):
        pass
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match=expected.format(dispatch.ENVIRONMENT)):
        choose(call())


def test_what_a_call_is_made_of(monkeypatch):
    q = torch.zeros(1, requires_grad=True)
    assert Call.of("attention", q, q, head_dim=8) == Call("attention", "cpu", torch.float32, True, (("head_dim", 8),))
    with torch.no_grad():
        assert not Call.of("attention", q).grad
    assert Call.of("attention", q, q.double()).dtype is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Call.of("attention", q).device == "interpreter"
    assert auto(Call.of("attention", q)) == ("torch", "the interpreter is for tests")


def test_explain(capsys):
    choice = explain("temporal_attention", device="sm_90", dtype=torch.bfloat16, frames=16, head_dim=40)
    assert choice.backend == "torch"
    assert capsys.readouterr().out == (
        "temporal_attention sm_90 bfloat16 forward frames=16 head_dim=40: torch, "
        "no measurement says that triton is faster here\n"
    )


def test_a_function_refuses_what_it_is_asked_in_vain():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="temporal_attention: .* on the CPU"):
        temporal_attention(x, x, x, frames=2, num_heads=2, backend="triton")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, animatediff_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
