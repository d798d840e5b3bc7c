"""LoRA branches against dense weight changes; merging, scales and removal leave no trace."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.models.lora import LoRA, LoRAStack
from animatediff.models.lora_algorithms import low_rank
from animatediff.models.lora_layers import AdaptedLayer, LoRAEntry
from animatediff.utils import UserError


class Net(nn.Module):
    """One layer of every sort that a LoRA can change, and a norm, which it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.proj_in = nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.attn2 = nn.Module()
        self.attn2.to_k = nn.Linear(8, 6, bias=False)
        self.attn2.to_out = nn.ModuleList([nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj_in(F.silu(self.conv_in(x))))
        return self.attn2.to_out[0](F.silu(self.attn2.to_k(x.flatten(2).mT)))


SHAPES = {"conv_in": (8, 3, 3, 3), "proj_in": (8, 8, 1, 1), "attn2_to_k": (6, 8), "attn2_to_out_0": (4, 6)}


def entry(layer: str, *, rank: int = 2, alpha: float | None = None, tucker: bool = False, seed: int = 0) -> LoRAEntry:
    rng = torch.Generator().manual_seed(seed + 7 * list(SHAPES).index(layer))
    out, width, *kernel = SHAPES[layer]
    ones = [1] * len(kernel)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=rng)

    target = f"unet.{layer}"
    keys = {"down": f"lora_unet_{layer}.lora_down.weight", "up": f"lora_unet_{layer}.lora_up.weight"}
    if tucker:
        mid = draw(rank + 1, rank, *kernel)
        tensors = {"down": draw(rank, width, *ones), "up": draw(out, rank + 1, *ones), "mid": mid}
    else:
        tensors = {"down": draw(rank, width, *kernel), "up": draw(out, rank, *ones)}
    return LoRAEntry(target, tensors, alpha, keys=keys)


def pair(down: tuple[int, int], up: tuple[int, int]) -> dict[str, Tensor]:
    return {"down": torch.ones(down), "up": torch.ones(up)}


def lora(name: str = "style", *, seed: int = 0, **kwargs) -> LoRA:
    return LoRA(name, "lora", tuple(entry(layer, seed=seed, **kwargs) for layer in SHAPES))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


LAYERS = [(layer, False) for layer in SHAPES] + [("conv_in", True), ("proj_in", True)]


@pytest.mark.parametrize(("layer", "tucker"), LAYERS)
def test_branch_is_the_dense_weight_change(net, layer, tucker):
    change = entry(layer, alpha=1.0, tucker=tucker)
    path = layer.replace("_to", ".to").replace("_0", ".0")
    module = dict(net.named_modules())[path]
    shape = (2, module.weight.shape[1], 5, 5) if module.weight.dim() == 4 else (2, 7, module.weight.shape[1])
    inputs = torch.randn(shape)
    plain, dense = module(inputs), copy.deepcopy(module)
    dense.weight += 0.7 * (1.0 / 2) * low_rank(**change.tensors)
    LoRAStack(net).add(LoRA("one", "lora", (change,)), 0.7)
    changed = dict(net.named_modules())[path]
    assert not torch.allclose(changed(inputs), plain, atol=1e-2)
    torch.testing.assert_close(changed(inputs), dense(inputs), rtol=1e-5, atol=1e-5)


def test_low_rank_by_the_definition():
    conv, tucker = (entry("conv_in", tucker=tucker).tensors for tucker in (False, True))
    expected = torch.zeros(SHAPES["conv_in"])
    for r in range(2):
        expected += conv["up"][:, r, 0, 0][:, None, None, None] * conv["down"][r][None]
    torch.testing.assert_close(low_rank(**conv), expected)
    expected = torch.zeros(SHAPES["conv_in"])
    for r in range(3):
        for s in range(2):
            outer = tucker["up"][:, r, 0, 0][:, None] * tucker["down"][s, :, 0, 0][None]
            expected += outer[:, :, None, None] * tucker["mid"][r, s]
    torch.testing.assert_close(low_rank(**tucker), expected)


def test_merged_equals_unmerged_and_unmerge_restores_every_bit(net, x):
    before, parameters = weights(net), dict(net.named_parameters())
    stack = LoRAStack(net)
    stack.add(lora(alpha=3.0), 0.6)
    stack.add(lora("other", seed=99, rank=3), -0.4)
    assert_same(net.state_dict(), before)
    unmerged = net(x)
    stack.merge()
    stack.merge()
    assert stack.merged and list(net.state_dict()) == list(before)
    assert not torch.equal(net.conv_in.weight, before["conv_in.weight"])
    torch.testing.assert_close(net(x), unmerged, rtol=1e-5, atol=1e-5)
    stack.unmerge()
    assert not stack.merged
    assert_same(net.state_dict(), before)
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert torch.equal(net(x), unmerged)


def test_scale_zero_is_the_plain_network(net, x):
    plain, before = net(x), weights(net)
    stack = LoRAStack(net)
    stack.add(lora(), 0.0)
    assert torch.equal(net(x), plain)
    stack.merge()
    assert_same(net.state_dict(), before)


def test_scales_change_at_any_time(net, x):
    stack = LoRAStack(net)
    stack.add(lora(), 1.0)
    strong = net(x)
    stack.set_scale("style", 0.5)
    half = net(x)
    assert not torch.allclose(half, strong, atol=1e-3)
    stack.merge()
    stack.set_scale("style", 1.0)
    assert stack.merged
    torch.testing.assert_close(net(x), strong, rtol=1e-5, atol=1e-5)
    stack.set_scale("style", 0.5)
    stack.unmerge()
    assert torch.equal(net(x), half)


def test_several_loras_add_linearly(net):
    x = torch.randn(5, 8)
    plain = net.attn2.to_k(x)
    stack = LoRAStack(net)
    stack.add(lora("a", seed=1), 0.3)
    a = net.attn2.to_k(x) - plain
    stack.add(lora("b", seed=2), -1.5)
    both = net.attn2.to_k(x) - plain
    stack.remove("a")
    b = net.attn2.to_k(x) - plain
    assert a.abs().max() > 0.01 and b.abs().max() > 0.01
    torch.testing.assert_close(both, a + b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_remove_and_clear_leave_no_trace(net, x, merged):
    plain, before = net(x), weights(net)
    stack = LoRAStack(net)
    stack.add(lora("a"))
    only_a = net(x)
    if merged:
        stack.merge()
    stack.add(lora("b", seed=5), 2.0)
    assert stack.names == ["a", "b"] and stack.merged == merged
    stack.remove("b")
    torch.testing.assert_close(net(x), only_a, rtol=1e-5, atol=1e-5)
    stack.add(lora("b", seed=6))
    stack.clear()
    assert stack.names == [] and not stack.merged
    assert_same(net.state_dict(), before)
    assert torch.equal(net(x), plain)
    assert not any(isinstance(module, AdaptedLayer) for module in net.modules())


def test_a_network_that_shares_the_weights_is_not_affected(net, x):
    other = Net()
    other.load_state_dict(net.state_dict(), assign=True)
    assert other.conv_in.weight.data_ptr() == net.conv_in.weight.data_ptr()
    plain, before = other(x), weights(other)
    stack = LoRAStack(net)
    stack.add(lora())
    assert not torch.allclose(net(x), plain, atol=1e-3)
    assert torch.equal(other(x), plain)
    stack.merge()
    assert torch.equal(other(x), plain)
    assert_same(other.state_dict(), before)


def test_alpha_over_rank_or_the_official_rule(net, x):
    stack = LoRAStack(net)
    stack.add(lora(alpha=0.5), 1.0)  # rank 2
    standard = net(x)
    stack.clear()
    stack.add(lora(), 0.25)
    torch.testing.assert_close(net(x), standard)
    stack.clear()
    stack.add(lora(alpha=0.5), 0.25, alpha_rule="official")
    torch.testing.assert_close(net(x), standard)


def test_linear_layers_and_1x1_convolutions_interchange(net, x):
    conv, linear = entry("proj_in"), entry("attn2_to_k")
    swapped = LoRA(
        "swapped",
        "lora",
        (
            LoRAEntry("unet.proj_in", {name: t.flatten(1) for name, t in conv.tensors.items()}),
            LoRAEntry("unet.attn2_to_k", {name: t[..., None, None] for name, t in linear.tensors.items()}),
        ),
    )
    stack = LoRAStack(net)
    stack.add(LoRA("plain", "lora", (conv, linear)))
    expected = net(x)
    stack.clear()
    stack.add(swapped)
    assert torch.equal(net(x), expected)


def test_text_encoder_and_unet_are_told_apart(net, x):
    text = Net().requires_grad_(False)
    plain, text_plain = net(x), text(x)
    change = entry("proj_in")
    stack = LoRAStack(net, text)
    stack.add(LoRA("t", "lora", (LoRAEntry("text.proj_in", change.tensors),)))
    assert torch.equal(net(x), plain)
    assert not torch.allclose(text(x), text_plain, atol=1e-3)


def test_report_names_every_key_that_was_not_applied(net):
    stranger = LoRAEntry(
        "unet.nowhere", pair((1, 1), (1, 1)), 1.0, keys={"down": "n.down", "up": "n.up", "alpha": "n.alpha"}
    )
    norm = LoRAEntry("unet.norm", pair((1, 1), (1, 1)))
    report = LoRAStack(net).add(LoRA("style", "lora", (entry("conv_in"), stranger, norm), unread=("extra",)))
    assert (report.applied, report.total) == (2, 7)
    assert set(report.unused) == {"n.down", "n.up", "n.alpha", "unet.norm", "extra"}
    assert str(report) == ("lora style: applied 2 of 7 keys; not applied: extra, n.down, n.up, n.alpha and 1 more")


def test_report_counts_layers_whose_alpha_is_0(net):
    report = LoRAStack(net).add(LoRA("style", "lora", (entry("conv_in", alpha=0.0), entry("proj_in"))))
    assert str(report) == "lora style: applied 4 of 4 keys; alpha is 0 in 1 of its layers: they change nothing"


def test_a_lora_of_which_nothing_applies_is_refused(net):
    stack = LoRAStack(net)
    entries = (LoRAEntry("unet.down_blocks_0_motion_modules_0_x_to_q", pair((1, 1), (1, 1))),)
    with pytest.raises(UserError, match="no motion modules with attention, load one first"):
        stack.add(LoRA("ZoomIn", "motion-lora", entries))
    with pytest.raises(UserError, match="no key fits the model.*down_blocks_0_motion_modules_0_x_to_q"):
        stack.add(LoRA("style", "lora", entries))
    assert stack.names == []


def test_a_wrong_shape_names_the_key_and_both_shapes_and_attaches_nothing(net, x):
    plain = net(x)
    wrong = LoRAEntry("unet.proj_in", pair((2, 16), (8, 2)), keys={"down": "lora_unet_proj_in.lora_down.weight"})
    stack = LoRAStack(net)
    with pytest.raises(UserError) as caught:
        stack.add(LoRA("style", "lora", (entry("conv_in"), wrong)))
    for part in ("lora_unet_proj_in.lora_down.weight", "(2, 16)", "(8, 2)", "(2, 8, 1, 1)", "(8, 8, 1, 1)"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="made for SD 2.x"):
        stack.add(LoRA("v2", "lora", (LoRAEntry("unet.attn2_to_k", pair((2, 1024), (6, 2))),)))
    with pytest.raises(UserError, match=r"\(8, 3\).*\(8, 2, 1, 1\)"):  # rank of up differs from rank of down
        stack.add(LoRA("rank", "lora", (LoRAEntry("unet.proj_in", pair((2, 8), (8, 3))),)))
    assert stack.names == [] and torch.equal(net(x), plain)


def test_wrong_arguments(net):
    stack = LoRAStack(net)
    stack.add(lora())
    with pytest.raises(UserError, match="style twice"):
        stack.add(lora())
    with pytest.raises(UserError, match="finite"):
        stack.add(lora("b"), math.inf)
    with pytest.raises(UserError, match="finite"):
        stack.set_scale("style", math.nan)
    with pytest.raises(UserError, match="alpha_rule"):
        stack.add(lora("b"), alpha_rule="kohya")
    with pytest.raises(UserError, match="'b'.*attached: style"):
        stack.remove("b")


def test_training_reaches_the_lora_alone(net, x):
    stack = LoRAStack(net)
    source = lora()
    stack.add(source)
    assert not net(x).requires_grad
    stack.requires_grad_(True)
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stack.parameters())
    assert all(p.grad is None for p in net.parameters())
    sizes = [t.numel() for entry in source.entries for t in entry.tensors.values()]
    assert sum(p.numel() for p in stack.parameters()) == sum(sizes)
    before = [e.tensors["down"].clone() for e in source.entries]
    torch.optim.SGD(stack.parameters(), lr=1.0).step()
    assert all(torch.equal(e.tensors["down"], old) for e, old in zip(source.entries, before, strict=True))


def test_a_network_moved_while_merged(net, x):
    before = weights(net)
    stack = LoRAStack(net)
    stack.add(lora())
    stack.merge()
    net.to(torch.bfloat16)
    stack.unmerge()
    assert_same(net.state_dict(), {name: tensor.bfloat16() for name, tensor in before.items()})
    changed = net(x.bfloat16())
    stack.clear()
    assert not torch.allclose(changed, net(x.bfloat16()), atol=0.05)


def test_half_precision_and_memory_format(net, x):
    net.to(torch.bfloat16, memory_format=torch.channels_last)
    stack = LoRAStack(net)
    stack.add(lora())
    assert net(x.bfloat16()).dtype == torch.bfloat16
    stack.merge()
    merged = net.conv_in.weight
    assert merged.dtype == torch.bfloat16 and merged.is_contiguous(memory_format=torch.channels_last)


def test_compiles_without_a_graph_break_and_follows_the_scale(net, x):
    stack = LoRAStack(net)
    stack.add(lora(), 1.0)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for scale in (1.0, 0.5, 0.0, -0.3):
        stack.set_scale("style", scale)
        torch.testing.assert_close(compiled(x), net(x))
    stack.merge()
    torch.testing.assert_close(compiled(x), net(x))
