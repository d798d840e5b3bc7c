"""LoRA (Hu et al. 2021, arXiv 2106.09685) kept beside the networks it changes: dW = scale * alpha / rank * up @ down.

A `LoRA` describes low-rank changes to named layers, whatever file it came from. A `LoRAStack` applies any number
of them to a UNet and a text encoder without touching their weights or parameter names, or merged and restored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.utils import UserError

AlphaRule = Literal["standard", "official"]
CONTEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # input width of attn2.to_k tells the family


@dataclass(frozen=True)
class LoRAEntry:
    """The low-rank change of one layer.

    Attributes:
        target: `unet.` or `text.`, then the layer's path with `_` for `.`, which is all that kohya files know:
            `unet.down_blocks_0_attentions_0_proj_in`.
        down: (rank, in) of a Linear, (rank, in, k, k) of a Conv2d.
        up: (out, rank) or (out, rank, 1, 1).
        alpha: the strength the file was trained with, in units of rank; None means alpha = rank.
        mid: (rank, rank, k, k) between a 1x1 `down` and `up` (LoCon in Tucker form), or None.
        keys: the file's own names of these tensors, for reports.
    """

    target: str
    down: Tensor
    up: Tensor
    alpha: float | None = None
    mid: Tensor | None = None
    keys: tuple[str, ...] = ()

    def factor(self, alpha_rule: AlphaRule = "standard") -> float:
        """alpha / rank; 1 where there is no alpha, and always 1 under the "official" rule."""
        return 1.0 if self.alpha is None or alpha_rule == "official" else self.alpha / self.down.shape[0]


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes of one file. `unread` names its keys that are no part of any LoRA."""

    name: str
    kind: Literal["lora", "motion-lora", "domain-adapter"]
    entries: tuple[LoRAEntry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoRAReport:
    """What `LoRAStack.add` did: `applied` of the file's `total` keys; `unused` names all others."""

    name: str
    kind: str
    applied: int
    total: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        line = f"{self.kind} {self.name}: applied {self.applied} of {self.total} keys"
        if not self.unused:
            return line
        more = f" and {len(self.unused) - 4} more" if len(self.unused) > 4 else ""
        return f"{line}; not applied: {', '.join(self.unused[:4])}{more}"


def delta_weight(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """The dense change up @ (mid) @ down before alpha and scale, float32: (out, in) or (out, in, k, k)."""
    down, up = down.float(), up.float()
    if mid is not None:
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), mid.float(), down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


class LoRABranch(nn.Module):
    """The low-rank path of one Linear or Conv2d, in the dtype and on the device of its weight.

    Parameters start frozen; `requires_grad_()` makes them trainable.

    Raises:
        UserError: the shapes do not fit the layer.
    """

    down: nn.Parameter
    up: nn.Parameter
    mid: nn.Parameter | None

    def __init__(self, entry: LoRAEntry, layer: nn.Linear | nn.Conv2d, *, factor: float, scale: float = 1.0):
        super().__init__()
        self.factor = factor
        self.scale = float(scale)
        self.register_parameter("mid", None)
        for name, tensor in _fit(entry, layer.weight).items():
            tensor = tensor.to(layer.weight.device, layer.weight.dtype, copy=True)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """x: the layer's input. Returns what to add to the layer's output, before factor and scale."""
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, self.down), self.up)
        kernel = self.down
        if self.mid is not None:
            x, kernel = F.conv2d(x, self.down), self.mid
        return F.conv2d(F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation), self.up)

    def add_to_output(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Forward hook of the layer."""
        if self.scale == 0:
            return output
        return torch.add(output, self(inputs[0], layer), alpha=self.factor * self.scale)

    def delta(self) -> Tensor:
        """The layer's weight change at the current scale, float32."""
        return self.factor * self.scale * delta_weight(self.down, self.up, self.mid)


class AttachedLoRA(nn.Module):
    """One LoRA of a stack: a branch for every layer it changes."""

    def __init__(self, name: str, layers: list[nn.Linear | nn.Conv2d], branches: list[LoRABranch]):
        super().__init__()
        self.name = name
        self.branches = nn.ModuleList(branches)
        self._layers = layers  # a plain list: the layers stay the network's
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def pairs(self) -> Iterator[tuple[nn.Linear | nn.Conv2d, LoRABranch]]:
        return zip(self._layers, self.branches, strict=True)

    def hook(self) -> None:
        """Let the branches act, where their layers are by now."""
        for layer, branch in self.pairs():
            branch.to(layer.weight)
            self._hooks.append(layer.register_forward_hook(branch.add_to_output))

    def unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []


class LoRAStack(nn.Module):
    """LoRAs on a UNet and a text encoder, each at its own scale; they add up linearly.

    Unmerged, every changed layer adds its low-rank branch in forward, by a hook: weights, parameter names and
    state dicts stay as they are, and a scale may change at any call. Merged, changed layers get a new weight
    (float32 sum, rounded once) in place of the original Parameter, which `unmerge` puts back; a network that shares
    the original's storage is never affected. A layer whose weight is read by other code than its own forward
    needs `merge`.

    The networks are not submodules of the stack; its parameters are the LoRAs' own, and frozen. They are created
    on the device and in the dtype of the layers: to move networks while unmerged, move the stack as well.
    One stack per network.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None = None):
        super().__init__()
        self.loras = nn.ModuleList()
        self._layers: dict[str, nn.Linear | nn.Conv2d] = {}
        for network, root in (("unet", unet), ("text", text_encoder)):
            for name, module in root.named_modules() if root is not None else ():
                if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                    self._layers[f"{network}.{name.replace('.', '_')}"] = module
        self._originals: dict[nn.Linear | nn.Conv2d, nn.Parameter] | None = None  # while merged

    @property
    def merged(self) -> bool:
        return self._originals is not None

    @property
    def names(self) -> list[str]:
        return [lora.name for lora in self.loras]

    def add(self, lora: LoRA, scale: float = 1.0, *, alpha_rule: AlphaRule = "standard") -> LoRAReport:
        """Apply a LoRA on top of those already there. Nothing is attached where it raises.

        Args:
            lora: from `animatediff.checkpoints.lora_files.read_lora`.
            scale: any finite factor; 0 leaves outputs unchanged, negative values push the other way.
            alpha_rule: "standard" honours alpha / rank; "official" ignores it, as the official AnimateDiff
                script does with kohya files. The two agree where a file has no alpha or alpha = rank.

        Raises:
            UserError: no key fits these networks, a shape does not fit, or the name is taken.
        """
        if lora.name in self.names:
            raise UserError(f"got LoRA {lora.name} twice, expected distinct names: add up the scales, or rename one")
        if alpha_rule not in ("standard", "official"):
            raise UserError(f'got alpha_rule {alpha_rule!r}, expected "standard" or "official"')
        _check_scale(lora.name, scale)
        layers, branches, unused = [], [], list(lora.unread)
        for entry in lora.entries:
            layer = self._layers.get(entry.target)
            if layer is None:
                unused += entry.keys or (entry.target,)
            else:
                layers.append(layer)
                branches.append(LoRABranch(entry, layer, factor=entry.factor(alpha_rule), scale=scale))
        if not branches:
            raise UserError(_nothing_applies(lora, self._layers))
        attached = AttachedLoRA(lora.name, layers, branches)
        with self._unmerged():
            self.loras.append(attached)
            attached.hook()
        total = len(lora.unread) + sum(len(entry.keys or (entry.target,)) for entry in lora.entries)
        return LoRAReport(lora.name, lora.kind, total - len(unused), total, tuple(unused))

    def scale(self, name: str) -> float:
        """One LoRA's scale. Raises: UserError for an unknown name."""
        return self._find(name).branches[0].scale

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Stay unmerged for a while, so that scales are cheap to change."""
        with self._unmerged():
            yield

    def set_scale(self, name: str, scale: float) -> None:
        """Change one LoRA's scale; as cheap as setting numbers, except while merged.

        Raises:
            UserError: an unknown name, or a scale that is not finite.
        """
        _check_scale(name, scale)
        lora = self._find(name)
        with self._unmerged():
            for branch in lora.branches:
                branch.scale = float(scale)

    def remove(self, name: str) -> None:
        """Take one LoRA off. Raises: UserError for an unknown name."""
        lora = self._find(name)
        with self._unmerged():
            lora.unhook()
            self.loras = nn.ModuleList(other for other in self.loras if other is not lora)

    def clear(self) -> None:
        """Take all LoRAs off and restore all weights."""
        self.unmerge()
        for name in self.names:
            self.remove(name)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold all LoRAs into the weights: no cost per call, at the price of a second copy of changed weights."""
        if self.merged:
            return
        self._originals = {}
        for lora in self.loras:
            lora.unhook()
        for layer, delta in self._total_deltas():
            weight = self._originals[layer] = layer.weight
            merged = torch.empty_like(weight).copy_(weight.float() + delta.to(weight.device))
            layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and go on unmerged."""
        if self._originals is None:
            return
        for layer, original in self._originals.items():
            now = layer.weight
            if (original.dtype, original.device) != (now.dtype, now.device):  # the network was moved meanwhile
                moved = original.detach().to(now.device, now.dtype)
                original = nn.Parameter(moved, requires_grad=original.requires_grad)
            layer.weight = original
        self._originals = None
        for lora in self.loras:
            lora.hook()

    def _total_deltas(self) -> Iterator[tuple[nn.Linear | nn.Conv2d, Tensor]]:
        """One layer at a time, so that a single dense change is held."""
        branches: dict[nn.Linear | nn.Conv2d, list[LoRABranch]] = {}
        for lora in self.loras:
            for layer, branch in lora.pairs():
                if branch.scale != 0:
                    branches.setdefault(layer, []).append(branch)
        for layer, group in branches.items():
            yield layer, sum((branch.delta() for branch in group[1:]), start=group[0].delta())

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Make a change on plain weights, and merge again if they were merged."""
        merged = self.merged
        self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()

    def _find(self, name: str) -> AttachedLoRA:
        for lora in self.loras:
            if lora.name == name:
                return lora
        raise UserError(f"got LoRA name {name!r}, expected one of those attached: {', '.join(self.names) or 'none'}")


def _check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise UserError(f"got scale {scale} for LoRA {name}, expected a finite number, e.g. 0.8")


def _fit(entry: LoRAEntry, weight: Tensor) -> dict[str, Tensor]:
    """The entry's tensors in the weight's rank of dimensions: 1x1 convolutions and linear layers interchange."""
    rank, ones = entry.down.shape[0], (1,) * (weight.dim() - 2)
    tensors = {"down": entry.down, "up": entry.up}
    wanted = {"down": (rank, *weight.shape[1:]), "up": (weight.shape[0], rank, *ones)}
    if entry.mid is not None:
        outer = entry.mid.shape[0]
        tensors["mid"] = entry.mid
        wanted = {"down": (rank, weight.shape[1], *ones), "up": (weight.shape[0], outer, *ones)}
        wanted["mid"] = (outer, rank, *weight.shape[2:])
    if any(_core(tensors[name].shape) != _core(shape) for name, shape in wanted.items()):
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        expected = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
        raise UserError(
            f"got {got} in {(entry.keys or (entry.target,))[0]}, expected {expected} for the model's weight "
            f"{tuple(weight.shape)}: {_mismatch_hint(entry, weight)}"
        )
    return {name: tensors[name].reshape(shape) for name, shape in wanted.items()}


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the kernel sizes of a 1x1 convolution."""
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def _mismatch_hint(entry: LoRAEntry, weight: Tensor) -> str:
    made_for = CONTEXT_WIDTHS.get(entry.down.shape[1])
    if entry.target.endswith(("attn2_to_k", "attn2_to_v")) and made_for and entry.down.shape[1] != weight.shape[1]:
        return f"this LoRA was made for {made_for}, use one made for the base model"
    return "this LoRA was made for a network of another size, use one made for the base model"


def _nothing_applies(lora: LoRA, layers: dict[str, nn.Module]) -> str:
    line = f"got {lora.kind} {lora.name} of which no key fits the model, expected at least one"
    if lora.kind == "motion-lora" and not any("motion_modules" in n and n.endswith("_to_q") for n in layers):
        return f"{line}: the model has no motion modules with attention, load one first (official ones go with v2)"
    names = [entry.target for entry in lora.entries[:3]]
    return f"{line}: it changes {', '.join(names)}…; use a LoRA made for the base model"
