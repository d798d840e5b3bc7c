"""How much memory a clip will take, from the sizes of the networks alone: nothing is loaded, nothing is computed.

The networks run on tensors without contents, held and chunked as for a clip, and every piece of memory that comes and
goes is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from animatediff_kernels.cpu import counted_as_on_cpu
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from animatediff.checkpoints.load import without_initialization
from animatediff.config.memory_options import Memory
from animatediff.config.networks import UNetConfig, VAEConfig
from animatediff.models.chunks import parts_alike, set_chunk
from animatediff.models.resting_weights import PlainCopier, RestingWeights, find_units, weights_of
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.memory import storage_of

M = TypeVar("M", bound=nn.Module)
OVERHEAD = {"cuda": 600 * 10**6}  # of CUDA's context, workspaces of its libraries, gaps between tensors: assumed


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device.

    Attributes:
        weights: that are there all the time, by network; and what else is there, as "Python and torch".
        stages: the most that there is beside them: "prompts", "a step", "decoding".
        latents: of the whole clip.
    """

    weights: dict[str, int]
    stages: dict[str, int]
    latents: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.weights.values()) + self.latents + max(self.stages.values())

    def __str__(self) -> str:
        rows = self.weights | {"latents": self.latents} | self.stages | {"peak": self.peak}
        return "\n".join(f"{name:<26}{size / 1e6:10,.0f} MB" for name, size in rows.items())


@dataclass(frozen=True)
class Sizes:
    """Of a request's networks.

    Attributes:
        texts: parameters of all text encoders together.
        others: parameters of further networks, by name. residuals: whether they add to the skip connections.
        decodes_in_float32: the VAE overflows in float16.
    """

    unet: UNetConfig
    vae: VAEConfig
    texts: int = 0
    others: Mapping[str, int] = field(default_factory=dict)
    residuals: bool = False
    decodes_in_float32: bool = False


def plan_memory(
    sizes: Sizes,
    *,
    frames: int,
    height: int,
    width: int,
    window: int | None = None,
    tile: int = 0,
    clips: int = 1,
    parts: int = 2,
    text_tokens: int = 77,
    memory: Memory | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    beside: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """What clips take on a device while they are made together and decoded one after the other, frame by frame.

    Args:
        frames: of a clip. window: how many of them go through the network at once; None: all.
        height, width: pixels, multiples of 8. tile: a side of what the network sees of them; 0: all.
        clips: that are made together.
        parts: of guidance, 1 to 3.
        memory: how networks are held and chunked.
        device: its type.
        beside: what is on the device anyway.
    """
    m, side, unet = memory or Memory(), sizes.vae.downsampling, sizes.unet
    h, w = height // side, width // side
    length, rows = min(window or frames, frames), clips * (1 if m.split_guidance else parts)
    seen = (min(x, tile // side) if tile else x for x in (h, w))
    step_shape = (rows, length, unet.in_channels, *seen)
    resting, step = _step_bytes(unet, step_shape, text_tokens, dtype, device, m.chunk_tokens, m.weights, m.offload)
    if sizes.residuals:
        step += 2 * residual_bytes(unet, step_shape, dtype)  # of every frame, and joined
    precise = torch.float32 if sizes.decodes_in_float32 and dtype == torch.float16 else dtype
    decoded = (min(m.vae_frames, frames), sizes.vae.latent_channels, h, w)
    decoder, decode = _decode_bytes(sizes.vae, decoded, precise, device, m.vae_tile, m.offload != "none")
    texts, others = sizes.texts * dtype.itemsize, {name: n * dtype.itemsize for name, n in sizes.others.items()}
    weights, prompts = {"weights, UNet": resting}, 0
    if m.offload == "none":
        weights |= {"weights, VAE": decoder, "weights, text": texts}
        weights |= {f"weights, {name}": size for name, size in others.items()}
    else:  # of these a layer or block is there at a time; the largest is a vocabulary's table, or a part of a network
        prompts = texts // 3
        step += max(others.values(), default=0) // 10
        decode += decoder
    weights |= beside or {}
    if device in OVERHEAD:
        weights["CUDA, assumed"] = OVERHEAD[device]
    latents = clips * frames * sizes.vae.latent_channels * h * w * 4
    return MemoryPlan(weights, {"prompts": prompts, "a step": step + 3 * latents, "decoding": decode}, latents)


@lru_cache(maxsize=64)
def _step_bytes(
    unet: UNetConfig,
    shape: tuple[int, ...],
    text_tokens: int,
    dtype: torch.dtype,
    device: str,
    chunk: int,
    weights: str,
    offload: str,
) -> tuple[int, int]:
    """Of the UNet's weights that stay on the device, and the most beside them while it runs once."""
    cpu = device == "cpu"
    with without_contents(device):
        network = cast(UNet(unet), dtype)
        resting = bytes_of(network)
        if offload == "blocks" or weights:
            storage = storage_of(Memory(weights=weights))  # type: ignore[arg-type]
            here = torch.device("meta")
            away = here if offload == "blocks" else None
            held = RestingWeights(network, here, dtype, storage=storage, rest_device=away, copier=PlainCopier(here))
            blocks = sum(t.nbytes for block in held.blocks for t in weights_of(block))
            resting = bytes_of(network) - (blocks if offload == "blocks" else 0)
            resting += sum(scale.nbytes for scale in held.scales.values())
        set_chunk(network, chunk)
        x, t = torch.empty(shape, dtype=dtype), torch.empty(shape[0])
        text = torch.empty(shape[0], text_tokens, unet.context_dim, dtype=dtype)
        added = {}
        if unet.added_channels:
            numbers = 6
            pooled = unet.added_channels - 256 * numbers if unet.added_channels > 256 * numbers else 16
            added = {"pooled": torch.empty(shape[0], pooled, dtype=dtype), "time_ids": torch.empty(shape[0], numbers)}
        if offload == "blocks":  # a call of few pixels tells the order; from then on the next block is there, too
            peak_bytes(lambda: network(x[:, :2, :, :8, :8], t, text, **added))
        peak = peak_bytes(lambda: network(x, t, text, **added), cpu=cpu)
    return resting, peak + x.nbytes + text.nbytes


@lru_cache(maxsize=64)
def _decode_bytes(
    vae: VAEConfig, shape: tuple[int, ...], dtype: torch.dtype, device: str, tile: int, offload: bool
) -> tuple[int, int]:
    """Of a VAE's weights (with `offload` those of its largest layers), and the most beside them while it decodes."""
    with without_contents(device):
        decoder = cast(VAE(vae), dtype)
        decoder.tile = tile
        weights = bytes_of(decoder)
        if offload:
            weights = 2 * max(sum(t.nbytes for t in weights_of(unit)) for unit in find_units(decoder))
        z = torch.empty(shape, dtype=dtype)
        decoded = peak_bytes(lambda: decoder.decode(z).clamp(-1, 1), cpu=device == "cpu")
    return weights, decoded


def residual_bytes(unet: UNetConfig, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What ControlNet or SparseCtrl add to the skip connections and the middle block of a call."""
    rows, frames, _, h, w = shape
    channels, total = unet.block_out_channels, unet.block_out_channels[0] * h * w
    for level, width in enumerate(channels):
        total += unet.layers_per_block * width * h * w
        if level < len(channels) - 1:
            h, w = -(-h // 2), -(-w // 2)
        total += width * h * w  # of the downsampled map, or the middle block
    return rows * frames * total * dtype.itemsize


# ---- counting ---------------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make within it, while they live."""

    def __init__(self, cpu: bool = False) -> None:
        super().__init__()
        self.cpu = cpu
        self.now = self.most = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        for x in tree_leaves((args, kwargs)):  # what was there before, of which an operator may return a view
            if isinstance(x, Tensor):
                self.known.add(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        if func is torch.ops.aten.convolution.default and self.cpu:  # oneDNN's own layouts of both
            self.most = max(self.most, self.now + args[0].nbytes + out.nbytes)
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


class fused_attention(TorchFunctionMode):
    """Within it torch's attention makes its result alone, as its fused kernels do, and no matrix of scores."""

    def __init__(self, on: bool = True):
        super().__init__()
        self.on = on

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.on and func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def without_contents(device: str) -> Iterator[None]:
    """Within it new tensors have sizes alone, and layers go the way of the device."""
    way = counted_as_on_cpu() if device == "cpu" else nullcontext()
    with torch.device("meta"), without_initialization(), parts_alike(), fused_attention(device != "mps"), way:
        yield


def peak_bytes(function: Callable[[], object], *, cpu: bool = False) -> int:
    """The most bytes that the tensors made by `function` take at one time; those that it is given do not count.

    cpu: count what oneDNN takes, too.
    """
    with torch.no_grad(), _Live(cpu) as live:
        function()
    return live.most


def bytes_of(network: nn.Module) -> int:
    """Of its weights and buffers."""
    return sum(x.nbytes for x in (*network.parameters(), *network.buffers()))


def cast(network: M, dtype: torch.dtype) -> M:
    """In evaluation, with floating-point weights of `dtype`; `Module.to` cannot take tensors without contents."""
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and x.is_floating_point():
                    y = x.detach().to(dtype)
                    held[name] = nn.Parameter(y, requires_grad=False) if held is module._parameters else y
    return network.eval()
