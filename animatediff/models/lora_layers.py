"""The change of one layer by one LoRA, and the layer that takes the place of a changed one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from animatediff.models.lora_algorithms import SCALED, weight_change
from animatediff.utils import UserError

AlphaRule = Literal["standard", "official"]
CONTEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # input width of attn2.to_k tells the family


@dataclass(frozen=True)
class LoRAEntry:
    """The change of one layer.

    Attributes:
        target: `unet.` or `text.`, then the layer's path with `_` for `.`, which is all that kohya files know:
            `unet.down_blocks_0_attentions_0_proj_in`.
        tensors: by the names in `lora_algorithms.TENSORS` and COMMON.
        alpha: the strength the file was trained with, in units of rank; None means alpha = rank. Of OFT and BOFT the
            bound on their rotation.
        algorithm: a key of `lora_algorithms.TENSORS`.
        keys: the file's own names of these tensors, by the tensors' names here; `alpha` is one.
    """

    target: str
    tensors: dict[str, Tensor]
    alpha: float | None = None
    algorithm: str = "lora"
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def file_keys(self) -> tuple[str, ...]:
        """What the file calls it, for reports."""
        return tuple(self.keys.values()) or (self.target,)

    @property
    def rank(self) -> int:
        """The inner dimension of the factors; 1 where nothing is a product."""
        t = self.tensors
        for name in ("down", "w1_b", "a2") if self.algorithm != "lokr" else ("w2_b", "w1_b"):
            if name in t:
                return min(t[name].shape[:2]) if name == "a2" else t[name].shape[0]
        return 1

    def factor(self, alpha_rule: AlphaRule = "standard") -> float:
        """alpha / rank; 1 where there is no alpha, and always 1 under the "official" rule."""
        scaled = self.alpha is not None and self.algorithm in SCALED and alpha_rule == "standard"
        return self.alpha / self.rank if scaled else 1.0


class LayerChange(nn.Module):
    """What one LoRA does to one layer. Parameters start frozen; `requires_grad_()` makes them trainable.

    A plain LoRA is kept in the dtype of the layer's weight, as its branch computes in it; the others in float32.

    Raises:
        UserError: the shapes do not fit the layer.
    """

    def __init__(self, entry: LoRAEntry, layer: nn.Module, *, factor: float, scale: float = 1.0):
        super().__init__()
        self.algorithm, self.alpha, self.factor, self.scale = entry.algorithm, entry.alpha, factor, float(scale)
        # A product of two thin matrices is cheaper as a branch beside the layer than as a change of its weight.
        self.is_branch = entry.algorithm == "lora" and not entry.tensors.keys() - {"down", "up", "mid"}
        for name, tensor in _fitted(entry, layer).items():
            floating = tensor.is_floating_point()
            tensor = tensor.to(layer.weight.device, torch.float32 if floating else tensor.dtype, copy=True)
            if floating:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        self.move_to(layer)

    def move_to(self, layer: nn.Module) -> None:
        self.to(layer.weight.device, layer.weight.dtype if self.is_branch else torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        return {**self._parameters, **self._buffers}

    def branch(self, x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """x: the layer's input. Returns what to add to the layer's output, before factor and scale."""
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, self.down), self.up)
        kernel = self.down
        if "mid" in self._parameters:
            x, kernel = F.conv2d(x, self.down), self.mid
        return F.conv2d(F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation), self.up)

    def deltas(self, layer: nn.Module) -> dict[str, Tensor]:
        """Change of every parameter of the layer at the current scale, float32."""
        t = self.tensors()
        found = {}
        if t.keys() - {"bias"}:
            options = {"factor": self.factor, "alpha": self.alpha, "scale": self.scale}
            found["weight"] = weight_change(self.algorithm, t, layer.weight, **options)
        if "bias" in t:
            found["bias"] = self.scale * t["bias"]
        return found


class AdaptedLayer(nn.Module):
    """Stands in the place of a layer while LoRAs act on it: the same parameters under the same names.

    The layer itself is no submodule: it is used as it is, and put back when the last LoRA is taken off.
    """

    def __init__(self, layer: nn.Module, changes: Sequence[LayerChange]):
        super().__init__()
        self._parameters = layer._parameters  # shared: moving, casting and loading reach both
        vars(self)["layer"] = layer
        self.changes = tuple(changes)  # a plain tuple: the stack owns them

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["layer"], name)  # its sizes and settings

    def forward(self, *inputs: Tensor, **options: object) -> Tensor:
        acting = [change for change in self.changes if change.scale != 0]
        dense = [change for change in acting if not change.is_branch]
        if dense:
            changed = changed_parameters(self.layer, dense)
            out = torch.func.functional_call(self.layer, changed, inputs, options)
        else:
            out = self.layer(*inputs, **options)
        for change in acting:
            if change.is_branch:
                out = torch.add(out, change.branch(inputs[0], self.layer), alpha=change.factor * change.scale)
        return out


def changed_parameters(layer: nn.Module, changes: Sequence[LayerChange]) -> dict[str, Tensor]:
    """The layer's parameters with the sum of all changes, rounded once to their dtype; those alone that change."""
    deltas: dict[str, Tensor] = {}
    for change in changes:
        for name, delta in change.deltas(layer).items():
            deltas[name] = deltas[name] + delta if name in deltas else delta
    changed = {}
    for name, delta in deltas.items():
        own = getattr(layer, name)
        changed[name] = (own.float() + delta.to(own.device)).to(own.dtype)
    return changed


def _fitted(entry: LoRAEntry, layer: nn.Module) -> dict[str, Tensor]:
    """The entry's tensors, of a plain LoRA in the dimensions of the layer's weight.

    Raises:
        UserError: they do not fit the layer.
    """
    weight, tensors = layer.weight, dict(entry.tensors)
    wanted = _low_rank_shapes(tensors, weight) if entry.algorithm == "lora" else {}
    if "bias" in tensors:
        wanted["bias"] = tuple(layer.bias.shape) if layer.bias is not None else ()
    fits = all(_core(tensors[name].shape) == _core(shape) for name, shape in wanted.items())
    if fits:
        tensors |= {name: tensors[name].reshape(shape) for name, shape in wanted.items()}
    compared = (
        {"down", "up"} <= tensors.keys() <= wanted.keys()
    )  # trying it imports much of torch that nothing else does
    if not fits or not (compared or _gives_weight_change(entry, tensors, weight)):
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in entry.tensors.items())
        expected = ", ".join(f"{name} {shape}" for name, shape in wanted.items()) or f"a {entry.algorithm} change"
        raise UserError(
            f"got {got} in {entry.file_keys[0]}, expected {expected} for the model's weight "
            f"{tuple(weight.shape)}: {_mismatch_hint(entry, weight)}"
        )
    return tensors


def _low_rank_shapes(tensors: dict[str, Tensor], weight: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes in the weight's rank of dimensions: 1x1 convolutions and linear layers interchange."""
    rank, ones = tensors["down"].shape[0], (1,) * (weight.dim() - 2)
    if "mid" not in tensors:
        return {"down": (rank, *weight.shape[1:]), "up": (weight.shape[0], rank, *ones)}
    outer = tensors["mid"].shape[0]
    return {
        "down": (rank, weight.shape[1], *ones),
        "up": (weight.shape[0], outer, *ones),
        "mid": (outer, rank, *weight.shape[2:]),
    }


def _gives_weight_change(entry: LoRAEntry, tensors: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether the tensors make a change of the weight's shape: tried on shapes alone."""
    if not tensors.keys() - {"bias"}:
        return True
    shapes = {name: torch.empty(t.shape, device="meta", dtype=t.dtype) for name, t in tensors.items()}
    shapes = {name: t.float() if t.is_floating_point() else t for name, t in shapes.items()}
    try:
        change = weight_change(entry.algorithm, shapes, torch.empty(weight.shape, device="meta"), alpha=entry.alpha)
    except (RuntimeError, KeyError, IndexError, ValueError):
        return False
    rows, *columns = weight.shape
    if "residual_indices" in tensors:
        indices, size = tensors["residual_indices"], torch.tensor([[rows], [math.prod(columns)]])
        if indices.dim() != 2 or len(indices) != 2 or ((indices < 0) | (indices >= size)).any():
            return False
    return change.shape == weight.shape


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the kernel sizes of a 1x1 convolution."""
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def _mismatch_hint(entry: LoRAEntry, weight: Tensor) -> str:
    inputs = entry.tensors["down"].shape[1] if entry.algorithm == "lora" and entry.tensors["down"].dim() > 1 else 0
    if entry.target.endswith(("attn2_to_k", "attn2_to_v")) and inputs in CONTEXT_WIDTHS and inputs != weight.shape[1]:
        return f"this LoRA was made for {CONTEXT_WIDTHS[inputs]}, use one made for the base model"
    return "this LoRA was made for a network of another size, use one made for the base model"
