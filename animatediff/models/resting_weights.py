"""Weights that rest in another place, or in fewer bits, and come when their block computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from animatediff.models.attention import SpatialTransformerBlock
from animatediff.models.layers import Downsample, ResnetBlock, Upsample
from animatediff.models.lora_layers import AdaptedLayer
from animatediff.models.motion import TemporalTransformerBlock

BLOCKS = (ResnetBlock, SpatialTransformerBlock, TemporalTransformerBlock, Downsample, Upsample)
FLOAT8 = torch.float8_e4m3fn


class Copier(Protocol):
    """Brings weights to where they compute; `start` may return before they are there, `finish` waits for them."""

    def start(self, made: Sequence[tuple[Tensor, Tensor | None, torch.dtype]]) -> Any: ...

    def finish(self, pending: Any) -> list[Tensor]: ...


class PlainCopier:
    """Copies at once."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self, made: Sequence[tuple[Tensor, Tensor | None, torch.dtype]]) -> list[Tensor]:
        return [restored(weight, scale, dtype, self.device) for weight, scale, dtype in made]

    def finish(self, pending: list[Tensor]) -> list[Tensor]:
        return pending


class CudaCopier(PlainCopier):
    """Copies on a stream of its own, beside the block that computes."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)

    def start(self, made: Sequence[tuple[Tensor, Tensor | None, torch.dtype]]) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self.stream):
            copies = super().start(made)
            return copies, self.stream.record_event()

    def finish(self, pending: tuple[list[Tensor], Any]) -> list[Tensor]:
        copies, event = pending
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for copy in copies:  # so that its memory is not given to the other stream while this one reads it
            copy.record_stream(current)
        return copies


class RestingWeights:
    """The weights of a network's blocks rest on `rest_device`, or as `storage`, and are whole only while used.

    Hooks of others, layers of LoRAs and whatever else stands in a block find its weights as they would be without:
    parameters stay the same objects, of which only the data changes. What is outside of blocks is on `device` always.
    While one block computes the next is fetched, as the order of the last call tells.

    Args:
        network: in evaluation, with weights on the CPU.
        dtype: that it computes in.
        storage: that matrices and convolutions rest in; None: `dtype`. float8_e4m3fn has a scale for each output.
        rest_device: None: `device`, where `storage` alone saves memory.
        blocks: modules whose weights rest; by default all of BLOCKS.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        *,
        storage: torch.dtype | None = None,
        rest_device: torch.device | None = None,
        blocks: Sequence[nn.Module] | None = None,
        copier: Copier | None = None,
    ):
        self.dtype, self.storage = dtype, storage or dtype
        self.copier: Copier = copier or (CudaCopier(device) if device.type == "cuda" else PlainCopier(device))
        self.prefetches = rest_device is not None
        self.scales = WeakTensorKeyDictionary()
        self.follows: dict[nn.Module, nn.Module] = {}
        self.last: nn.Module | None = None
        self.pending: tuple[nn.Module, list[Tensor], Any] | None = None
        self.active: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.blocks = list(blocks) if blocks is not None else find_blocks(network)
        self._put_to_rest(network, device, rest_device or device)
        for block in self.blocks:
            block.register_forward_pre_hook(self._before, prepend=True)
            block.register_forward_hook(self._after, always_call=True)
        if network not in self.blocks:
            network.register_forward_hook(lambda *_: self._forget(), always_call=True)

    @torch.no_grad()
    def _put_to_rest(self, network: nn.Module, device: torch.device, rest_device: torch.device) -> None:
        resting = {id(t) for block in self.blocks for t in weights_of(block)}
        for tensor in weights_of(network):
            if id(tensor) not in resting:
                tensor.data = placed(tensor, device, self.dtype)
                continue
            wanted = self.storage if tensor.dim() > 1 else self.dtype
            if wanted == FLOAT8:
                rest, self.scales[tensor] = quantised(tensor)
            else:
                rest = placed(tensor, rest_device, wanted)
            tensor.data = pinned(rest.to(rest_device), device)

    def _before(self, block: nn.Module, args: Any) -> None:
        if block in self.active:  # within itself
            return
        tensors, pending = self._fetched(block)
        arrived = self.copier.finish(pending)
        self.active[block] = [(tensor, tensor.data) for tensor in tensors]
        for tensor, data in zip(tensors, arrived, strict=True):
            tensor.data = data
        if self.last is not None:
            self.follows[self.last] = block
        self.last = block
        if self.prefetches and (following := self.follows.get(block)) is not None and following is not block:
            self.pending = (following, *self._start(following))

    def _fetched(self, block: nn.Module) -> tuple[list[Tensor], Any]:
        if self.pending is not None and self.pending[0] is block:
            _, tensors, pending = self.pending
            self.pending = None
            if [id(t) for t in tensors] == [id(t) for t in weights_of(block)]:  # no LoRA came or went meanwhile
                return tensors, pending
        self.pending = None
        return self._start(block)

    def _start(self, block: nn.Module) -> tuple[list[Tensor], Any]:
        tensors = list(weights_of(block))
        return tensors, self.copier.start([(t.data, self.scales.get(t), self._computes_in(t)) for t in tensors])

    def _computes_in(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.dtype == self.storage else tensor.dtype

    def _after(self, block: nn.Module, args: Any, out: Any) -> None:
        for tensor, rest in self.active.pop(block, ()):
            tensor.data = rest

    def _forget(self) -> None:
        """Nothing is fetched for the next call of the network, which may be long in coming."""
        self.last = self.pending = None


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost BLOCKS of a network."""
    if isinstance(network, BLOCKS):
        return [network]
    return [block for child in network.children() for block in find_blocks(child)]


def find_units(network: nn.Module) -> list[nn.Module]:
    """Its BLOCKS, and the layers outside of them that have weights: together nearly all of a network's weights."""
    if isinstance(network, BLOCKS) or not any(True for _ in network.children()):
        return [network] if any(True for _ in weights_of(network)) else []
    return [unit for child in network.children() for unit in find_units(child)]


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and those of LoRAs that act on its layers, each once."""
    seen: set[int] = set()
    for part in module.modules():
        owners = [part, *part.changes] if isinstance(part, AdaptedLayer) else [part]
        for owner in owners:
            for tensor in (*owner._parameters.values(), *owner._buffers.values()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A weight on a device, in `dtype` if it has floating-point numbers; images channels_last on CUDA."""
    tensor = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    if device.type == "cuda" and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def pinned(rest: Tensor, device: torch.device) -> Tensor:
    """In memory that a GPU reads by itself, where weights rest on the CPU for one."""
    return rest.pin_memory() if device.type == "cuda" and rest.device.type == "cpu" else rest


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (o, …) as float8_e4m3fn, and for each output the scale (o, 1 …), float32, that makes the most of it."""
    weight = weight.detach().float()
    largest = torch.finfo(FLOAT8).max
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).clamp(min=1e-12) / largest
    return (weight / scale).to(FLOAT8), scale


def restored(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a weight at rest, ready to compute with."""
    moved = weight.to(device, non_blocking=True)
    if scale is not None:
        return (moved.float() * scale.to(device)).to(dtype)
    return moved.to(dtype, copy=moved is weight)
