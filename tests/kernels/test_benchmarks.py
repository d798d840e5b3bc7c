"""The parts of the benchmarks that need no clock: shapes, tables, the red test, what every provider computes."""

import csv
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from animatediff_kernels import dispatch

from animatediff.utils import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/benchmarks"))
import floor  # noqa: E402
import ops  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402
import step  # noqa: E402

SMALL = {  # sizes of every operation that a CPU computes at once
    "temporal_attention": {"clips": 2, "frames": 3, "tokens": 5, "heads": 2, "head_dim": 8},
    "attention": {"images": 4, "rows": 2, "tokens": 6, "keys": 7, "heads": 2, "head_dim": 8},
    "group_norm_silu": {"images": 4, "channels": 8, "height": 3, "width": 5, "groups": 2, "frames": 2, "silu": 1}
    | {"shift": 1},
    "layer_norm": {"images": 4, "tokens": 5, "width": 8, "frames": 2},
    "geglu": {"images": 2, "tokens": 3, "width": 8},
    "linear_geglu": {"images": 2, "tokens": 3, "width": 8, "inner": 12},
}


@pytest.fixture(scope="module")
def traced():
    return shapes.trace("16f-512")


def test_the_shapes_are_those_of_the_step(traced):
    """Counted by others from diffusers' network: 42 temporal, 16 self- and 16 cross-attentions, by level."""
    temporal = [(s["tokens"], s["head_dim"], c) for s, c in sizes_of(traced, "temporal_attention")]
    assert temporal == [(4096, 40, 10), (1024, 80, 10), (256, 160, 10), (64, 160, 12)]
    attention = [(s["tokens"], s["keys"], s["rows"], c) for s, c in sizes_of(traced, "attention")]
    own = [(4096, 4096, 32, 5), (1024, 1024, 32, 5), (256, 256, 32, 5), (64, 64, 32, 1)]
    assert sorted(attention) == sorted(own + [(tokens, 77, 2, c) for tokens, _, _, c in own])
    assert sum(c for s, c in sizes_of(traced, "layer_norm")) == 111
    assert sum(c for s, c in sizes_of(traced, "group_norm_silu")) == 45 + 21 + 16
    assert sum(c for s, c in sizes_of(traced, "group_norm_silu") if s["shift"]) == 22
    assert sum(c for s, c in sizes_of(traced, "geglu")) == 16 + 21
    assert sum(c for s, c in sizes_of(traced, "linear_geglu")) == 16 + 21


def sizes_of(traced, op):
    return [(dict(s.sizes), s.calls) for s in traced if s.op == op]


def test_flops_of_the_step_are_known(traced):
    gflop = {
        op: sum(c * ops.OPS[op].flops(s) for s, c in sizes_of(traced, op)) / 1e9
        for op in ("temporal_attention", "attention", "linear_geglu")
    }
    assert gflop["temporal_attention"] == pytest.approx(49, rel=0.02)
    assert gflop["attention"] == pytest.approx(3920 + 114, rel=0.02)
    assert gflop["linear_geglu"] == pytest.approx((5315 + 4912) * 2 / 3, rel=0.02)  # the layer back is half as wide


def test_norms_over_the_frames_of_a_clip():
    """Of v1's ResNets and of diffusers' motion modules: as many as there are, those of frames beside them."""
    found = [(dict(s.sizes), s.calls) for s in shapes.trace("16f-512-pooled")]
    assert sum(calls for sizes, calls in found if sizes["frames"] == 16) == 45 + 21
    assert sum(calls for sizes, calls in found if sizes["frames"] == 1) == 16


def test_images_come_back_as_they_came():
    spec, sizes = ops.OPS["group_norm_silu"], SMALL["group_norm_silu"]
    inputs = ops.make_inputs(spec, sizes, "cpu", torch.float32)
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    for name in ("eager", "torch"):
        out = ops.providers(spec, sizes)[name](*inputs)
        assert out.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("mode", run.MODES)
@pytest.mark.parametrize("op", ops.OPS)
def test_every_provider_computes_the_same(op, mode):
    spec, sizes = ops.OPS[op], SMALL[op]
    inputs = ops.make_inputs(spec, sizes, "cpu", torch.float32)
    for name, function in ops.providers(spec, sizes).items():
        if name not in ("compile", "triton", "triton-apart", "sdpa-efficient", "sdpa-cudnn"):
            assert run.error(function, spec, sizes, inputs, mode) < 1e-6, name


@pytest.mark.parametrize("op", ops.OPS)
def test_the_dispatch_is_told_of_the_calls_that_it_will_see(op, monkeypatch):
    spec, sizes, seen = ops.OPS[op], SMALL[op], []
    real = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call, backend: seen.append(call) or real(call, backend))
    inputs = ops.make_inputs(spec, sizes, "cpu", torch.float32)
    as_on_cuda = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    spec.run(sizes, "torch")(*as_on_cuda)
    assert {"rows": seen[0].rows} | dict(seen[0].shape) == spec.key(sizes)
    assert [name for name in dispatch.SIZES[op] if name in spec.key(sizes)] == [name for name, _ in seen[0].shape]


def rows(**ms):
    return [{"provider": name, "ms": value, "right": "yes"} for name, value in ms.items()]


def test_speedups_are_over_the_fastest_of_torch():
    table = {
        r["provider"]: r["speedup"] for r in run.with_speedups(rows(eager="9", compile="4", torch="8", triton="2"))
    }
    assert table == {"eager": "", "compile": "", "torch": "0.50", "triton": "2.00"}


def test_a_red_test_withholds_the_speedup():
    table = rows(eager="4", triton="2")
    table[1]["right"] = "no"
    assert [row["speedup"] for row in run.with_speedups(table)] == ["", ""]


def test_a_result_that_leaves_memory_unwritten_is_red():
    spec, sizes = ops.OPS["geglu"], SMALL["geglu"]
    inputs = ops.make_inputs(spec, sizes, "cpu", torch.float32)
    assert run.error(lambda x: torch.empty(2, 3, 8), spec, sizes, inputs, "fwd") == float("inf")


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_a_wrong_gradient_of_a_weight_is_red(weight):
    """What every item adds to, too."""
    spec, sizes = ops.OPS["layer_norm"], SMALL["layer_norm"]
    inputs = ops.make_inputs(spec, sizes, "cpu", torch.float32)
    right = spec.run(sizes, "torch")

    def wrong(*inputs):
        inputs = list(inputs)
        inputs[weight] = 2 * inputs[weight] - inputs[weight].detach()  # the same values, twice the gradient
        return right(*inputs)

    assert run.error(right, spec, sizes, inputs, "fwd+bwd") < 1e-6
    assert run.error(wrong, spec, sizes, inputs, "fwd+bwd") == pytest.approx(1, rel=1e-4)


def row(**values):
    return dict.fromkeys(run.COLUMNS, "") | values


def test_rows_of_one_key_replace_each_other(tmp_path):
    path = tmp_path / "results/op.csv"
    run.write_rows(path, [row(op="b", ms="1"), row(op="a", ms="2")])
    run.write_rows(path, [row(op="b", ms="3"), row(op="b", mode="fwd", ms="4")])
    with path.open(newline="") as file:
        table = [(r["op"], r["mode"], r["ms"]) for r in csv.DictReader(file)]
    assert table == [("a", "", "2"), ("b", "", "3"), ("b", "fwd", "4")]


def test_a_provider_that_fails_today_keeps_no_row(tmp_path):
    path = tmp_path / "op.csv"
    old = [row(op="b", provider=p) for p in ("torch", "triton")] + [row(op="b", mode="fwd", provider="triton")]
    run.write_rows(path, old, renewed=run.SHAPE)
    run.write_rows(path, [row(op="b", provider="torch", ms="3")], renewed=run.SHAPE)
    with path.open(newline="") as file:
        table = [(r["mode"], r["provider"], r["ms"]) for r in csv.DictReader(file)]
    assert table == [("", "torch", "3"), ("fwd", "triton", "")]


def test_a_new_table_of_results_leaves_the_code_as_committed(tmp_path):
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "a.csv").write_text("1")
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "a.csv").write_text("2")
    (tmp_path / "b.py").write_text("2")
    first = run.commit(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{7,}", first) and run.commit(tmp_path) == first + "-dirty"


def test_the_dispatch_reads_what_the_benchmark_notes(tmp_path, monkeypatch):
    path = tmp_path / "measured.csv"
    path.write_text("op,arch,dtype,mode,shape,rows,triton_ms,torch_ms\n")
    monkeypatch.setattr(run, "device_name", lambda device: "sm_90")
    shape = shapes.Shape("temporal_attention", "16f-512", "layer", tuple(SMALL["temporal_attention"].items()))
    measured = rows(**{"sdpa-flash": "4", "torch": "3", "triton": "2"})
    run.note_measured(path, shape, "fwd", "cpu", torch.float16, measured)
    run.note_measured(path, shape, "fwd+bwd", "cpu", torch.float16, measured[:2])
    key = ("temporal_attention", "sm_90", "float16", "forward", "frames=3 head_dim=8")
    assert dispatch.read_measurements(path) == {key: {2 * 3 * 5: (2.0, 3.0)}}
    run.note_measured(path, shape, "fwd", "cpu", torch.float16, [*measured, *rows(**{"triton-apart": "1.5"})])
    assert dispatch.read_measurements(path) == {key: {2 * 3 * 5: (2.0, 1.5)}}
    measured[2]["right"] = "no"
    run.note_measured(path, shape, "fwd", "cpu", torch.float16, measured)
    assert dispatch.read_measurements(path) == {}


def test_one_device_and_dtype_are_drawn():
    here = {"device": "a", "clip": "16f-512", "mode": "fwd", "right": "yes"}
    table = [row(**here, dtype="float16"), row(**here, dtype="float32"), row(**here | {"device": "b"})]
    with pytest.raises(UserError, match=r"got results of 2 devices.*a \| b"):
        plot.select(table, None, "16f-512", "fwd", None)
    with pytest.raises(UserError, match=r"got results of 2 dtypes.*float16 \| float32"):
        plot.select(table, "a", "16f-512", "fwd", None)
    assert plot.select(table, "a", "16f-512", "fwd", "float32") == table[1:2]
    other = row(**here | {"device": "b", "clip": "16f-256"})
    assert plot.select([table[0], other], None, "16f-512", "fwd", None) == table[:1]
    with pytest.raises(UserError, match="no right results of b, 16f-512, fwd, float64"):
        plot.select(table, "b", "16f-512", "fwd", "float64")


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    numbers = {"ms": "1", "tflops": "2", "gbps": "30", "ceiling_tflops": "10", "ceiling_gbps": "100"}
    table = [row(op="attention", sizes="keys=77", provider=p, **numbers) for p in ("eager", "triton")]
    assert all(path.stat().st_size > 1000 for path in plot.draw(table, tmp_path))


@torch.no_grad()
def test_diffusers_network_of_the_step_is_ours(monkeypatch):
    """The same weights by name, so that the two times are of the same function."""
    pytest.importorskip("diffusers")
    tiny = replace(shapes.CONFIG, block_out_channels=(32, 32, 64, 64), context_dim=16)
    monkeypatch.setattr(step, "CONFIG", tiny)
    x, t, context = torch.randn(2, 4, 4, 8, 8), torch.tensor([500, 500]), torch.randn(2, 7, 16)
    ours = step.our_network()(x, t, context)
    theirs = step.diffusers_network()(
        x.transpose(1, 2), t, encoder_hidden_states=context.repeat_interleave(4, 0)
    ).sample.transpose(1, 2)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("frames", [1, 4])
def test_networks_of_one_process_take_turns(monkeypatch, frames):
    monkeypatch.setattr(step, "CONFIG", replace(shapes.CONFIG, block_out_channels=(32, 32, 64, 64), context_dim=16))
    args = Namespace(part="step", device="cpu", dtype="float32", size=64, frames=frames)
    run_one = step.run_here(args, ("ours", "ours-torch"))
    (first, out), (_, again), (_, other) = (run_one(name) for name in ("ours", "ours", "ours-torch"))
    assert out.shape == (2, frames, 4, 8, 8) and torch.equal(out, again)
    assert (out - other).norm() < 1e-5 * other.norm()  # upsampling is computed in another order
    assert first["peak_mb"] > 1 and first["seconds"] > 0


def test_operators_by_kind():
    names = {"aten::convolution": "convolutions", "aten::addmm": "linear layers", "aten::add_": "sums"}
    names |= {"aten::mul_": "gates", "aten::copy_": "copies", "aten::native_group_norm": "GroupNorm, LayerNorm"}
    names |= {"aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "aten::view": "others"}
    assert {name: floor.kind_of(name) for name in names} == names


@torch.no_grad()
def test_the_floor_is_of_true_flops_and_least_bytes():
    x, w, image, kernel = torch.randn(4, 8), torch.randn(8, 3), torch.randn(1, 2, 5, 5), torch.randn(6, 2, 3, 3)
    q = torch.randn(1, 2, 7, 8)
    with floor.Work() as work:
        y = (x @ w).view(2, 6)  # 4 x 8 by 8 x 3
        y.mul_(2)
        torch.empty(100).fill_(1)
        torch.zeros(1).expand(1000) + 1
        torch.nn.functional.conv2d(image, kernel, padding=1)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    found = {}
    for name, flops, moved in work.found:
        found.setdefault(name, (flops, moved))
    assert found["aten::mm"] == (2 * 4 * 8 * 3, 4 * (32 + 24 + 12))
    assert found["aten::mul_.Tensor"] == (0, 4 * (12 + 12)) and "aten::view" not in found
    assert found["aten::fill_.Scalar"] == (0, 4 * 100) and not any("empty" in name for name in found)
    assert found["aten::add.Tensor"] == (0, 4 * 1001)
    assert found["aten::convolution"] == (2 * 25 * 6 * 2 * 9, 4 * (50 + 108 + 150))
    flops, _ = found["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert flops == 2 * 2 * 2 * 7 * 7 * 8
    seconds = work.floor((1e3, 1e9))
    assert seconds["convolutions"] == 2 * 25 * 6 * 2 * 9 / 1e3 and seconds["sums"] == 4 * 1001 / 1e9


def test_a_step_against_its_floor(capsys, monkeypatch):
    monkeypatch.setattr(floor, "ceilings", lambda device, dtype: (1e9, 1e10))
    layer = torch.nn.Conv2d(4, 4, 3)
    floor.breakdown(lambda: layer(torch.randn(1, 4, 128, 128)), torch.device("cpu"), torch.float32)
    table = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    ms, _, least, share = table["convolutions"]
    assert least == "4.57"  # 126 x 126 places, 4 x 4 channels, 3 x 3, two operations each
    assert float(share.rstrip("%")) == pytest.approx(457 / float(ms), rel=0.1) and table["all"][1] == "100.0%"


def test_what_won_is_only_known_of_all(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "--measured", "--provider", "torch", "triton"])
    with pytest.raises(SystemExit) as stop:
        run.parse()
    assert stop.value.code == 2 and "got --measured with --provider" in capsys.readouterr().err
