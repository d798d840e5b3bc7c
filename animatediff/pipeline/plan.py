"""How much memory a clip will take, from the sizes of the networks alone: nothing is loaded, nothing is computed.

The networks run on tensors without contents, and every piece of memory that comes and goes is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from animatediff.config.networks import UNetConfig, VAEConfig
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes.

    Attributes:
        weights: of every network. denoise, decode: the most that a step and the VAE hold beside them, results included.
        latents: of the whole clip. video: of its frames as bytes.
    """

    weights: dict[str, int]
    denoise: int
    decode: int
    latents: int
    video: int

    @property
    def peak(self) -> int:
        """The most at any time, with all networks on one device and every frame kept until the end."""
        return sum(self.weights.values()) + self.latents + max(self.denoise, self.decode + self.video)

    def __str__(self) -> str:
        rows = {f"weights, {name}": size for name, size in self.weights.items()}
        rows |= {"latents": self.latents, "a step": self.denoise, "decoding": self.decode, "frames": self.video}
        return "\n".join(f"{name:<24}{size / 1e6:10,.0f} MB" for name, size in (rows | {"peak": self.peak}).items())


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make within it, while they live."""

    def __init__(self) -> None:
        super().__init__()
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
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that the tensors made by `function` take at one time; those that it is given do not count."""
    with torch.no_grad(), _Live() as live:
        function()
    return live.most


def bytes_of(network: nn.Module) -> int:
    """Of its weights and buffers."""
    return sum(x.nbytes for x in (*network.parameters(), *network.buffers()))


def plan_memory(
    unet: UNetConfig,
    vae: VAEConfig,
    *,
    frames: int,
    height: int,
    width: int,
    window: int | None = None,
    text_tokens: int = 77,
    guided: bool = True,
    chunk_frames: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    others: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """What one clip takes.

    Args:
        frames: of the clip. window: how many of them go through the network at once; None: all.
        height, width: pixels, multiples of 8.
        guided: whether the network computes the unconditional half beside the conditional one.
        chunk_frames: that the VAE decodes at once.
        others: bytes of further networks, by name, such as text encoder and SparseCtrl, as their files' headers say.
    """
    size = height // 8, width // 8
    with FakeTensorMode(), torch.device(device):
        network, decoder = _cast(UNet(unet), dtype), _cast(VAE(vae), dtype)
        rows, length = 1 + guided, min(window or frames, frames)
        x = torch.empty(rows, length, unet.in_channels, *size, dtype=dtype)
        t, text = torch.empty(rows), torch.empty(rows, text_tokens, unet.context_dim, dtype=dtype)
        z = torch.empty(min(chunk_frames, frames), vae.latent_channels, *size, dtype=dtype)
        return MemoryPlan(
            weights={"UNet": bytes_of(network), "VAE": bytes_of(decoder), **(others or {})},
            denoise=peak_bytes(lambda: network(x, t, text)),
            decode=peak_bytes(lambda: decoder.decode(z)),
            latents=frames * vae.latent_channels * size[0] * size[1] * dtype.itemsize,
            video=3 * frames * height * width,
        )


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In evaluation, with floating-point weights of `dtype`; `Module.to` cannot take tensors without contents."""
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and x.is_floating_point():
                    y = x.detach().to(dtype)
                    held[name] = nn.Parameter(y, requires_grad=False) if held is module._parameters else y
    return network.eval()
