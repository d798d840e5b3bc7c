"""LoRA and its relatives on a network: layers of their own in the place of the network's, or merged and restored.

A `LoRA` describes the changes of named layers, whatever file it came from; `lora_algorithms` computes them. A
`LoRAStack` applies any number of LoRAs to a UNet and a text encoder without touching their weights or parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from animatediff.models.lora_layers import (
    CONTEXT_WIDTHS,
    AdaptedLayer,
    AlphaRule,
    LayerChange,
    LoRAEntry,
    changed_parameters,
)
from animatediff.utils import UserError

NORMS = (nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class LoRA:
    """The changes of one file.

    Attributes:
        unread: its keys that are no part of any LoRA.
        base: the family of image models it was made for, one of CONTEXT_WIDTHS, where the file tells.
        embeddings: textual inversions that are packed into it: word -> the vectors of its file, by their keys.
    """

    name: str
    kind: Literal["lora", "motion-lora", "domain-adapter"]
    entries: tuple[LoRAEntry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    base: str | None = None
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoRAReport:
    """What `LoRAStack.add` did: `applied` of the file's `total` keys; `unused` names all others.

    `zero_alphas` counts the layers whose alpha is 0.
    """

    name: str
    kind: str
    applied: int
    total: int
    unused: tuple[str, ...]
    zero_alphas: int = 0

    def __str__(self) -> str:
        line = f"{self.kind} {self.name}: applied {self.applied} of {self.total} keys"
        if self.zero_alphas:
            line += f"; alpha is 0 in {self.zero_alphas} of its layers: they change nothing"
        if not self.unused:
            return line
        more = f" and {len(self.unused) - 4} more" if len(self.unused) > 4 else ""
        return f"{line}; not applied: {', '.join(self.unused[:4])}{more}"


class AttachedLoRA(nn.Module):
    """One LoRA of a stack: a change for every layer that it reaches, by target."""

    def __init__(self, name: str, changes: dict[str, LayerChange]):
        super().__init__()
        self.name = name
        self.targets = tuple(changes)
        self.changes = nn.ModuleList(changes.values())

    @property
    def scale(self) -> float:
        return self.changes[0].scale

    @scale.setter
    def scale(self, scale: float) -> None:
        for change in self.changes:
            change.scale = float(scale)


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place in a network and the layer that belongs there."""

    parent: nn.Module
    name: str
    layer: nn.Module

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


class LoRAStack(nn.Module):
    """LoRAs on a UNet and a text encoder, each at its own scale; they add up linearly, each against the plain weight.

    Unmerged, every changed layer is replaced by an `AdaptedLayer`: weights, parameter names and state dicts stay as
    they are, and a scale may change at any call. Merged, the layers are the network's own and get new parameters
    (float32 sum, rounded once) in place of the original ones, which `unmerge` puts back; a network that shares the
    originals' storage is never affected. A layer whose weight is read by other code than its own forward needs `merge`.

    The networks are not submodules of the stack; its parameters are the LoRAs' own, and frozen. They are created
    on the device of the layers: to move networks while unmerged, move the stack as well. One stack per network.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None = None, text_encoder_2: nn.Module | None = None):
        super().__init__()
        self.loras = nn.ModuleList()
        self._slots: dict[str, _Slot] = {}
        self._adapted: tuple[str, ...] = ()  # targets that hold an AdaptedLayer
        for network, root in (("unet", unet), ("text", text_encoder), ("text2", text_encoder_2)):
            for path, module in root.named_modules() if root is not None else ():
                convolution = isinstance(module, nn.Conv2d) and module.groups == 1
                if path and (convolution or isinstance(module, (nn.Linear, *NORMS))):
                    parent, _, name = path.rpartition(".")
                    slot = _Slot(root.get_submodule(parent), name, module)
                    self._slots[f"{network}.{path.replace('.', '_')}"] = slot
        self._originals: dict[tuple[nn.Module, str], nn.Parameter] | None = None  # while merged
        self.fixed = ""  # why nothing can be changed any more, for messages

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
        self._check_base(lora)
        changes, unused = {}, list(lora.unread)
        for entry in lora.entries:
            slot = self._slots.get(entry.target)
            if slot is None or (isinstance(slot.layer, NORMS) and entry.algorithm != "full"):
                unused += entry.file_keys
            else:
                factor = entry.factor(alpha_rule)
                changes[entry.target] = LayerChange(entry, slot.layer, factor=factor, scale=scale)
        if not changes:
            raise UserError(_nothing_applies(lora, self._slots))
        with self.unmerged():
            self.loras.append(AttachedLoRA(lora.name, changes))
            self._place_layers()
        total = len(lora.unread) + sum(len(entry.file_keys) for entry in lora.entries)
        zero_alphas = sum(change.factor == 0 for change in changes.values())
        return LoRAReport(lora.name, lora.kind, total - len(unused), total, tuple(unused), zero_alphas)

    def _check_base(self, lora: LoRA) -> None:
        """Layers of the same size occur in different families: what a LoRA was made for decides."""
        contexts = [s.layer.weight.shape[1] for target, s in self._slots.items() if target.endswith("attn2_to_k")]
        own = CONTEXT_WIDTHS.get(contexts[0]) if contexts else None
        if own and lora.base and own != lora.base:
            raise UserError(
                f"got LoRA {lora.name} made for {lora.base}, expected one for {own}: use another LoRA or base"
            )

    def scale(self, name: str) -> float:
        """One LoRA's scale. Raises: UserError for an unknown name."""
        return self._find(name).scale

    def set_scale(self, name: str, scale: float) -> None:
        """Change one LoRA's scale; as cheap as setting numbers, except while merged.

        Raises:
            UserError: an unknown name, or a scale that is not finite.
        """
        _check_scale(name, scale)
        lora = self._find(name)
        if lora.scale != scale:
            with self.unmerged():
                lora.scale = scale

    def remove(self, name: str) -> None:
        """Take one LoRA off. Raises: UserError for an unknown name."""
        lora = self._find(name)
        with self.unmerged():
            self.loras = nn.ModuleList(other for other in self.loras if other is not lora)
            self._place_layers()

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
        self._place_layers()
        for layer, changes in self._changes_by_layer():
            for name, tensor in changed_parameters(layer, changes).items():  # one layer at a time is held twice
                original = self._originals[layer, name] = getattr(layer, name)
                merged = torch.empty_like(original).copy_(tensor)
                setattr(layer, name, nn.Parameter(merged, requires_grad=original.requires_grad))

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and go on unmerged. Raises: UserError where they are `fixed`."""
        if self.fixed:
            raise UserError(self.fixed)
        if self._originals is None:
            return
        for (layer, name), original in self._originals.items():
            now = getattr(layer, name)
            if (original.dtype, original.device) != (now.dtype, now.device):  # the network was moved meanwhile
                moved = original.detach().to(now.device, now.dtype)
                original = nn.Parameter(moved, requires_grad=original.requires_grad)
            setattr(layer, name, original)
        self._originals = None
        self._place_layers()

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Stay unmerged within, where scales are cheap to change; merged afterwards if it was before."""
        merged = self.merged
        self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()

    def _place_layers(self) -> None:
        """Put adapted layers where LoRAs act, unless they are merged; the network's own everywhere else."""
        for target in self._adapted:
            self._slots[target].put(self._slots[target].layer)
        changes: dict[str, list[LayerChange]] = {}
        for lora in self.loras if not self.merged else ():
            for target, change in zip(lora.targets, lora.changes, strict=True):
                change.move_to(self._slots[target].layer)
                changes.setdefault(target, []).append(change)
        for target, group in changes.items():
            self._slots[target].put(AdaptedLayer(self._slots[target].layer, group))
        self._adapted = tuple(changes)

    def _changes_by_layer(self) -> Iterator[tuple[nn.Module, list[LayerChange]]]:
        changes: dict[str, list[LayerChange]] = {}
        for lora in self.loras:
            for target, change in zip(lora.targets, lora.changes, strict=True):
                if change.scale != 0:
                    changes.setdefault(target, []).append(change)
        for target, group in changes.items():
            yield self._slots[target].layer, group

    def _find(self, name: str) -> AttachedLoRA:
        for lora in self.loras:
            if lora.name == name:
                return lora
        raise UserError(f"got LoRA name {name!r}, expected one of those attached: {', '.join(self.names) or 'none'}")


def _check_scale(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise UserError(f"got scale {scale} for LoRA {name}, expected a finite number, e.g. 0.8")


def _nothing_applies(lora: LoRA, slots: dict[str, _Slot]) -> str:
    line = f"got {lora.kind} {lora.name} of which no key fits the model, expected at least one"
    if lora.kind == "motion-lora" and not any("motion_modules" in n and n.endswith("_to_q") for n in slots):
        return f"{line}: the model has no motion modules with attention, load one first (official ones go with v2)"
    names = [entry.target for entry in lora.entries[:3]]
    return f"{line}: it changes {', '.join(names)}…; use a LoRA made for the base model"
