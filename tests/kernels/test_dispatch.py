"""Which backend a call gets, and why."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from animatediff_kernels import (
    attention,
    calibration,
    cpu,
    dispatch,
    explain,
    geglu,
    group_norm_silu,
    layer_norm,
    linear_geglu,
    temporal_attention,
    use_backend,
)
from animatediff_kernels.dispatch import Call, Choice, auto, choose, read_measurements, refusal


def call(op="temporal_attention", device="sm_90", dtype=torch.bfloat16, grad=False, rows=1000, **shape):
    return Call(op, device, dtype, grad, rows, tuple((shape or {"frames": 16, "head_dim": 40}).items()))


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON", (3, 6))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


REFUSALS = [
    pytest.param(call(device="cpu"), "on the CPU", id="cpu"),
    pytest.param(call(device="mps"), "not on mps", id="another device"),
    pytest.param(call(device="sm_75"), "sm_75 is older than sm_80", id="an old GPU"),
    pytest.param(call(dtype=None), "differ in dtype", id="mixed dtypes"),
    pytest.param(call(dtype=torch.float64), "float64 is none of", id="dtype"),
    pytest.param(call(frames=65, head_dim=40), "frames 65 is outside 1 … 64", id="frames"),
    pytest.param(call(frames=16, head_dim=168), "head_dim 168 is outside 4 … 160", id="temporal head width"),
    pytest.param(call(dtype=torch.float32, frames=33, head_dim=40), "at most 32 frames", id="float32 frames"),
    pytest.param(call("attention", tokens=64, head_dim=512), "head_dim 512 is outside", id="head width"),
    pytest.param(call("layer_norm", width=8192), "width 8192 is outside", id="norm width"),
    pytest.param(call("linear_geglu", width=8200, inner=8), "width 8200 is outside", id="linear width"),
    pytest.param(call("linear_geglu", width=8, inner=32_769), "inner 32769 is outside", id="gated width"),
]


@pytest.mark.parametrize(("bad", "reason"), REFUSALS)
def test_refusals(bad, reason):
    assert reason in refusal(bad)
    assert auto(bad).backend == "torch" and reason in auto(bad).reason
    with pytest.raises(ValueError, match='backend "triton" was asked for, but .*' + reason):
        choose(bad, "triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON", None)
    assert auto(call()) == ("torch", "triton is not installed")
    monkeypatch.setattr(dispatch, "TRITON", (3, 2))
    assert auto(call()) == ("torch", "triton 3.2 is older than 3.6")


def test_the_version_of_triton(monkeypatch):
    def version(name):
        if name != "triton-windows":
            raise PackageNotFoundError(name)
        return "3.10.1.post2"

    monkeypatch.setattr(dispatch, "version", version)
    assert dispatch.installed_triton() == (3, 10)
    monkeypatch.setattr(dispatch, "version", lambda name: version(""))
    assert dispatch.installed_triton() is None


def test_auto_follows_the_measured_table(monkeypatch, tmp_path):
    table = tmp_path / "measured.csv"
    table.write_text(
        "op,arch,dtype,mode,shape,rows,triton_ms,torch_ms\n"
        "temporal_attention,sm_90,bfloat16,forward,frames=16 head_dim=40,1000,0.1,0.5\n"
        "temporal_attention,sm_90,bfloat16,train,frames=16 head_dim=40,1000,0.9,0.5\n"
    )
    monkeypatch.setattr(dispatch, "MEASURED", read_measurements(table))
    assert auto(call()) == ("triton", "measured at 1000 rows: triton 0.1 ms, torch 0.5 ms")
    assert auto(call(grad=True)) == ("torch", "measured at 1000 rows: triton 0.9 ms, torch 0.5 ms")
    for other in (call(device="sm_89"), call(dtype=torch.float16), call(frames=8, head_dim=40)):
        assert auto(other) == ("torch", "not timed yet on this GPU")


def test_between_measured_sizes_triton_must_have_won_at_both(monkeypatch):
    times = {100: (3.0, 2.0), 400: (3.0, 4.0), 800: (4.0, 8.0), 2000: (30.0, 20.0), 4000: (30.0, 40.0)}
    monkeypatch.setattr(dispatch, "MEASURED", {call().key: times})
    chosen = {n: auto(call(rows=n)).backend for n in (50, 100, 200, 400, 500, 800, 900, 2000, 4000, 9999)}
    assert {n for n, backend in chosen.items() if backend == "triton"} == {400, 500, 800, 4000, 9999}
    assert auto(call(rows=900)).reason == "measured at 2000 rows: triton 30 ms, torch 20 ms"
    assert auto(call(rows=50)).reason == "not timed yet on this GPU"


def test_auto_inside_a_compiled_graph(monkeypatch):
    """One graph per choice: the operator's own name shows which."""
    geglu_call = call("geglu", dtype=torch.float32, width=8)
    monkeypatch.setattr(dispatch, "MEASURED", {geglu_call.key: {8: (1.0, 2.0)}})
    monkeypatch.setattr(dispatch, "device_name", lambda device: "sm_90")
    graphs = []
    whole = torch.compile(geglu, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)
    for rows in (4, 8, 16):
        x = torch.randn(rows, 16)
        assert torch.allclose(whole(x), geglu(x, backend="torch"), atol=1e-6)
    assert ["animatediff" in code for code in graphs[:2]] == [False, True]


def test_a_linear_layer_leaves_its_gate_a_choice_of_its_own(monkeypatch):
    x, weight, bias, seen = torch.randn(4, 6), torch.randn(16, 6), torch.randn(16), []
    expected = linear_geglu(x, weight, bias)
    monkeypatch.setattr(dispatch, "MEASURED", {call("geglu", dtype=torch.float32, width=8).key: {4: (1.0, 2.0)}})
    monkeypatch.setattr(dispatch, "device_name", lambda device: "sm_90")
    monkeypatch.setattr(calibration, "calibrate", lambda *args: None)
    real = sys.modules["animatediff_kernels.geglu"].geglu_op
    monkeypatch.setattr(sys.modules["animatediff_kernels.geglu"], "geglu_op", lambda x: seen.append(x.shape) or real(x))
    assert torch.allclose(linear_geglu(x, weight, bias), expected, atol=1e-6) and seen == [(4, 16)]


def test_the_committed_table_is_readable():
    assert set(dispatch.LIMITS) <= set(dispatch.SIZES)
    assert all(len(key) == 5 and min(ms) > 0 for key, rows in dispatch.MEASURED.items() for ms in rows.values())


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
    own = Call("attention", "cpu", torch.float32, True, 4, (("head_dim", 8),))
    assert Call.of("attention", q, q, rows=4, head_dim=8) == own
    with torch.no_grad():
        assert not Call.of("attention", q, rows=4).grad
    assert Call.of("attention", q, q.double(), rows=4).dtype is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Call.of("attention", q, rows=4).device == "interpreter"
    assert auto(Call.of("attention", q, rows=4)) == ("torch", "the interpreter is for tests")


def test_explain(capsys):
    choice = explain("temporal_attention", rows=9, device="sm_90", dtype=torch.bfloat16, frames=16, head_dim=40)
    assert choice.backend == "torch"
    assert capsys.readouterr().out == (
        "temporal_attention sm_90 bfloat16 forward frames=16 head_dim=40 rows=9: torch, not timed yet on this GPU\n"
    )


def test_explain_knows_operations_sizes_and_devices(capsys):
    given = {"rows": 9, "device": "sm_90", "dtype": torch.bfloat16}
    explain("temporal_attention", **given, head_dim=40, frames=16)
    assert " frames=16 head_dim=40 " in capsys.readouterr().out
    assert explain("geglu", rows=9, device=torch.device("cpu"), width=8).backend == "torch"
    with pytest.raises(ValueError, match="got op='temporal_atention', expected one of temporal_attention"):
        explain("temporal_atention", **given)
    with pytest.raises(ValueError, match="got heads, expected sizes of geglu: width"):
        explain("geglu", **given, heads=8)


@torch.no_grad()
def test_explain_the_ways_of_cpus(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "onednn_or_mkl", lambda: Choice("onednn", "2.00 times as fast as MKL on this CPU"))
    wide = {"rows": 4 * 64, "channels": 320, "outputs": 640, "height": 8, "width": 8}
    assert explain("conv2d", **wide) == ("winograd", "fewer multiplications, equal to about 1e-6")
    assert capsys.readouterr().out.startswith(
        "conv2d cpu float32 forward channels=320 outputs=640 height=8 width=8 rows=256: winograd, fewer"
    )
    reason = "16 pixels, torch would first bring the weights into another order"
    assert explain("conv2d", **wide, stride=2) == ("rows", reason)
    assert explain("conv2d", **wide, kernel=1).backend == "torch"
    assert explain("conv2d", **wide | {"outputs": 64}) == ("torch", "320 to 64 channels, Winograd pays from 128")
    last = wide | {"outputs": 4, "height": 4, "width": 4}  # of the same network: its maps lie as those before
    assert explain("conv2d", **last).backend == "rows"
    assert explain("conv2d", **wide, doubled=1).backend == "winograd"
    assert explain("conv2d", **wide | {"outputs": 128}, doubled=1).backend == "four"
    with pytest.raises(ValueError, match="got no rows, expected those of geglu"):
        explain("geglu", width=8)
    for op, there in (("conv2d", wide), ("layout", {"width": 320}), ("products", {"width": 320})):
        assert explain(op, **there).backend != "torch"
        assert explain(op, **there, grad=True) == ("torch", "gradients may be needed")
        assert explain(op, **there, backend="torch") == ("torch", "asked for torch")
        assert explain(op, **there, dtype=torch.bfloat16).reason == "torch.bfloat16 on cpu, for float32 on CPUs"
        assert explain(op, **there, device="sm_90").reason == "sm_90 has no way of its own, only CPUs have"
        with pytest.raises(ValueError, match="got no width, expected sizes of"):
            explain(op, **{name: size for name, size in there.items() if name != "width"})
    assert explain("products", width=64).reason == "a network of 64 channels, expected at least 128"


def test_two_threads_that_ask_for_backends_leave_nothing_behind(monkeypatch):
    """The first to enter is the first to leave."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, "")  # as if it were not set
    one, other = use_backend("triton"), use_backend("torch")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert dispatch.requested() == "torch"
    other.__exit__(None, None, None)
    assert dispatch.requested() == "auto"


def test_a_function_refuses_what_it_is_asked_in_vain():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="temporal_attention: .* on the CPU"):
        temporal_attention(x, x, x, frames=2, num_heads=2, backend="triton")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, animatediff_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


MISFITS = {
    "images of a part of a clip": lambda: temporal_attention(*3 * [_(5, 3, 8)], frames=2, num_heads=2),
    "heads of unequal width": lambda: temporal_attention(*3 * [_(4, 3, 18)], frames=2, num_heads=4),
    "fewer keys than pixels": lambda: temporal_attention(_(4, 3, 8), _(2, 3, 8), _(4, 3, 8), frames=2, num_heads=2),
    "rows that do not divide": lambda: attention(_(3, 2, 8), _(2, 5, 8), _(2, 5, 8), num_heads=2),
    "keys without values": lambda: attention(_(2, 2, 8), _(2, 7, 8), _(2, 5, 8), num_heads=2),
    "keys of another width": lambda: attention(_(2, 2, 16), _(2, 2, 8), _(2, 2, 8), num_heads=2),
    "a width that heads do not divide": lambda: attention(*3 * [_(2, 2, 18)], num_heads=4),
    "a value without a gate": lambda: geglu(_(2, 7)),
    "weights of another layer": lambda: linear_geglu(_(2, 8), _(12, 6), _(12)),
    "a short bias": lambda: linear_geglu(_(2, 8), _(12, 8), _(11)),
    "weights that are too short": lambda: layer_norm(_(2, 3, 8), _(4), _(4)),
    "codes of a part of a clip": lambda: layer_norm(_(3, 3, 8), _(8), _(8), code=_(2, 8)),
    "groups that do not divide": lambda: group_norm_silu(_(2, 8, 3, 3), 3, _(8), _(8), eps=1e-5),
    "a bias that is too short": lambda: group_norm_silu(_(2, 8, 3, 3), 2, _(8), _(4), eps=1e-5),
    "statistics of a part of a clip": lambda: group_norm_silu(_(3, 8, 3, 3), 2, _(8), _(8), eps=1e-5, frames=2),
    "shifts of a part": lambda: group_norm_silu(_(3, 8, 3, 3), 2, _(8), _(8), eps=1e-5, shift=_(2, 8)),
}


@pytest.mark.parametrize("call", MISFITS.values(), ids=MISFITS)
def test_shapes_that_do_not_fit_are_refused_before_a_kernel_reads_beyond_them(call):
    with pytest.raises(ValueError, match="^got .*expected"):
        call()
