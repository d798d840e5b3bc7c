"""The compiled UNet: the same numbers, one graph per shape, a bound, and a way on where there is no compiler."""

import functools
import shutil
from copy import deepcopy

import pytest
import torch
from animatediff_kernels import geglu, use_backend
from torch import Tensor, nn

from animatediff.checkpoints.load import load_base, load_motion_module
from animatediff.checkpoints.lora_files import read_lora
from animatediff.models.lora import LoRAStack
from animatediff.models.twins import share_weights
from animatediff.pipeline import pipeline
from animatediff.pipeline.compiled import compile_unet
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.utils import UserError
from tests.nano import entry, write_config

WIDTH = 8


class SmallUNet(nn.Module):
    """What a compiler takes in a second: a UNet's arguments, a convolution and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.to_text, self.out = nn.Linear(6, 2 * WIDTH), nn.Linear(WIDTH, 4)
        self.scale = 1.0  # as a LoRA layer's

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        rows = self.conv_in(x.flatten(0, 1)).flatten(2).mT.unflatten(0, x.shape[:2])
        rows = rows + self.scale * geglu(self.to_text(context)).mean(1)[:, None, None] + t[:, None, None, None] / 1000
        return self.out(rows).mT.unflatten(3, x.shape[3:])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def inputs(frames: int = 2, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, frames, 4, 4, 4), torch.tensor([481, 481]), torch.randn(2, 7, width)


def uncompiled(graph, inputs):
    return graph.forward


def test_one_graph_per_shape_and_the_same_numbers():
    unet, told = SmallUNet(), []
    calls = [inputs(2), inputs(3), inputs(2)]
    expected = [unet(*call) for call in calls]
    record = compile_unet(unet, backend=uncompiled, tell=told.append)
    for call, right in zip(calls, expected, strict=True):
        assert torch.equal(unet(*call), right)
    assert record.graphs == 2 == len(told) and record.failure is None and "(2 of 8)" in told[1]
    record.undo()
    assert torch.equal(unet(*calls[0]), expected[0]) and "forward" not in unet.__dict__


def test_a_scale_is_a_constant_and_a_weight_is_not():
    unet, call = SmallUNet(), inputs()
    record = compile_unet(unet, backend=uncompiled, tell=lambda line: None)
    first = unet(*call)
    unet.out.bias.data += 1
    torch.testing.assert_close(unet(*call), first + 1)
    assert record.graphs == 1
    unet.scale = 0.5
    assert not torch.allclose(unet(*call), first + 1, atol=1e-3) and record.graphs == 2


def test_what_is_beyond_the_bound_runs_uncompiled():
    unet, told = SmallUNet(), []
    record = compile_unet(unet, most_graphs=1, backend=uncompiled, tell=told.append)
    for frames in (2, 3, 4, 2):
        call = inputs(frames)
        assert unet(*call).shape == call[0].shape
    assert record.graphs == 1 and len(told) == 2 and told[1].startswith("the UNet runs uncompiled: 1 shapes or LoRA")


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_without_a_compiler_the_network_runs_on(error):
    def missing(graph, inputs):
        raise error("no C++ compiler was found\nin PATH")

    unet, told, call = SmallUNet(), [], inputs()
    expected = unet(*call)
    record = compile_unet(unet, backend=missing, tell=told.append)
    assert torch.equal(unet(*call), expected) and torch.equal(unet(*call), expected)
    assert told == ["the UNet runs uncompiled: no C++ compiler was found"] and record.graphs == 0


def test_what_cannot_be_one_graph_runs_uncompiled():
    class Breaks(SmallUNet):
        def forward(self, *call):
            torch._dynamo.graph_break()
            return super().forward(*call)

    unet, told, call = Breaks(), [], inputs()
    expected = unet(*call)
    compile_unet(unet, backend=uncompiled, tell=told.append)
    assert torch.equal(unet(*call), expected) and len(told) == 1


def test_a_mistake_in_a_call_is_told_as_such_and_the_next_call_is_compiled():
    class Checks(SmallUNet):
        def forward(self, x, t, context):
            if x.shape[1] > 3:
                raise UserError(f"got {x.shape[1]} frames, expected at most 3")
            return super().forward(x, t, context)

    unet, told = Checks(), []
    record = compile_unet(unet, backend=uncompiled, tell=told.append)
    for _ in range(2):
        with pytest.raises(UserError, match="got 4 frames, expected at most 3"):
            unet(*inputs(4))
    unet(*inputs(3))
    assert record.failure is None and record.graphs == 1 == len(told)


def test_hooks_are_heard_whenever_they_are_there():
    """A graph that was made without one would leave it out."""
    unet, told, call = SmallUNet(), [], inputs()
    plain, doubled = unet(*call), 2 * unet(*call)
    record = compile_unet(unet, backend=uncompiled, tell=told.append)
    for _ in range(2):
        assert torch.equal(unet(*call), plain)
        hook = unet.out.register_forward_hook(lambda layer, given, out: 2 * out)
        assert torch.equal(unet(*call), doubled)
        hook.remove()
    assert record.graphs == 1 and len(told) == 2 and "while something reaches into it" in told[1]


def test_compiled_anew():
    unet, call = SmallUNet(), inputs()
    expected = unet(*call)
    first, second = (compile_unet(unet, backend=uncompiled, tell=lambda line: None) for _ in range(2))
    assert torch.equal(unet(*call), expected) and (first.graphs, second.graphs) == (0, 1)
    second.undo()
    assert "forward" not in unet.__dict__


@pytest.mark.parametrize("copy", [deepcopy, share_weights])
def test_copies_are_not_compiled_and_have_their_own_weights(copy):
    unet, call = SmallUNet(), inputs()
    record = compile_unet(unet, backend=uncompiled, tell=lambda line: None)
    expected, copied = unet(*call), copy(unet)
    copied.out.weight = nn.Parameter(2 * copied.out.weight)
    copied.out.bias = nn.Parameter(2 * copied.out.bias)
    torch.testing.assert_close(copied(*call), 2 * expected)
    assert torch.equal(unet(*call), expected) and record.graphs == 1


def test_the_bound_is_of_each_network():
    """torch's own, of all that runs the same code, is 8."""
    for _ in range(3):
        unet = SmallUNet()
        record = compile_unet(unet, backend=uncompiled, tell=lambda line: None)
        for frames in range(2, 6):
            unet(*inputs(frames))
        assert record.graphs == 4 and record.failure is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_torch_s_own_compiler(cuda_graphs):
    unet, call = SmallUNet(), inputs()
    expected = unet(*call)
    record = compile_unet(unet, cuda_graphs=cuda_graphs, tell=lambda line: None)
    for _ in range(2):
        torch.testing.assert_close(unet(*call), expected, rtol=1e-4, atol=1e-5)
    assert record.graphs == 1 and record.failure is None and record.seconds > 0


CALLS = [
    {"num_frames": 3},
    {"num_frames": 6, "windows": {"schedule": "open", "length": 3, "overlap": 1}},
    {"num_frames": 3, "motion_scale": 0.5},
    {"num_frames": 3, "pe_stretch": 2.0},
    {"num_frames": 3, "pag_scale": 2.0},
]


@pytest.mark.slow
def test_a_compiled_pipeline_makes_the_same_clips(nano, monkeypatch):
    """Whatever reaches into the network; whole clips and windows of them share a graph."""
    pipe = AnimateDiffPipeline.from_config(write_config(nano / "compiled.yaml", entry(nano)), device="cpu")

    def clips():
        same = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent", "seed": 3}
        with use_backend("torch"):  # a compiled network has torch's convolutions, too
            return [pipe("a fox", **same, **call).frames for call in CALLS]

    expected, told = clips(), []
    monkeypatch.setattr(pipeline, "compile_unet", functools.partial(compile_unet, backend=uncompiled))
    record = pipe.compile(tell=told.append)
    for found, right in zip(clips(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert record.failure is None and record.graphs == 2, told  # one of stretched clips


@pytest.mark.slow
def test_the_video_network_with_a_lora_is_one_graph(nano):
    unet = load_motion_module(load_base(nano / "nano.safetensors").unet, nano / "mm_v3.safetensors")[0]
    stack, call = LoRAStack(unet), inputs(2, unet.config.context_dim)
    stack.add(read_lora(nano / "adapter.safetensors"), 0.5)
    expected = unet(*call)
    record = compile_unet(unet, backend="aot_eager", tell=lambda line: None)
    for _ in range(2):
        torch.testing.assert_close(unet(*call), expected, rtol=1e-4, atol=1e-5)
    assert record.graphs == 1 and record.failure is None
