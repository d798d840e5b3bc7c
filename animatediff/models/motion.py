"""The motion module: a transformer along time, inserted after every layer of a frozen image UNet.

AnimateDiff (arXiv 2307.04725), sec. 4.2. Parameter names are those of the official checkpoints, below
`temporal_transformer`.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from animatediff_kernels import temporal_attention
from animatediff_kernels.cpu import on_cpu, plain_products
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import MotionConfig
from animatediff.models.attention import FeedForward
from animatediff.models.chunks import Chunked, in_parts
from animatediff.models.layers import GroupNorm, LayerNorm


def positional_encoding(
    frames: int, width: int, device: torch.device, dtype: torch.dtype, stretch: float = 1.0
) -> Tensor:
    """Sinusoidal encoding (frames, width): sin at even, cos at odd columns (Vaswani et al. 2017, sec. 3.5).

    Frames are 1 / stretch apart.
    """
    where = device if torch.compiler.is_compiling() else "cpu"  # a compiled network would copy it at every call
    position = torch.arange(frames, dtype=torch.float32, device=where)[:, None] / stretch
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device=where) * (-math.log(10_000.0) / width))
    table = torch.zeros(frames, width, device=where)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)[:, : width // 2]
    return table.to(device, dtype)


_kept_encoding = functools.cache(positional_encoding)


def encoding_of(x: Tensor, frames: int, dtype: torch.dtype, stretch: float) -> Tensor:
    """The positional encoding for tokens x; kept for the next call unless x is a compiler's or another stand-in."""
    stand_in = torch.compiler.is_compiling() or type(x) is not Tensor
    make = positional_encoding if stand_in else _kept_encoding
    return make(frames, x.shape[-1], x.device, dtype, stretch)


class TemporalAttention(Chunked):
    """Self-attention of each pixel along the frames. Queries, keys and values all see the frame's position."""

    stretch = 1.0  # frames per trained frame

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: ((b f), s, width), with the positional encoding of the frames in it if there is one."""
        pixels = max(self.chunk // len(x), 1) if self.chunk else x.shape[1]
        return in_parts(lambda x: self._forward(x, frames), pixels, x, dim=1)

    def _forward(self, x: Tensor, frames: int) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if not on_cpu(x) or torch.compiler.is_compiling():
            return self.to_out[0](temporal_attention(q, k, v, frames=frames, num_heads=self.num_heads))
        if x.dtype.itemsize == 2:  # products as small as these are slow in half precision, too
            q, k, v = q.float(), k.float(), v.float()
        with plain_products():
            out = temporal_attention(q, k, v, frames=frames, num_heads=self.num_heads)
        return self.to_out[0](out.to(x.dtype))


class TemporalConvolution(nn.Module):
    """In place of attention, with as many parameters (arXiv 2307.04725, sec. 5.3): 4 width^2 + width.

    A kernel of three frames, zeros beyond the clip, then a layer for each frame; SiLU keeps the two from being one. The
    paper does not tell its own layers.
    """

    def __init__(self, width: int):
        super().__init__()
        # Tokens are a map of frames x places, channels_last as they lie in memory: nothing is copied.
        self.conv = nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False)
        self.pointwise = nn.Linear(width, width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: ((b f), s, width)."""
        mixed = self.conv(rearrange(x, "(b f) s c -> b c f s", f=frames))
        return self.pointwise(F.silu(rearrange(mixed, "b c f s -> (b f) s c")))


class TemporalTransformerBlock(nn.Module):
    def __init__(self, width: int, config: MotionConfig):
        super().__init__()
        self.tells_positions = config.tells_positions
        self.attention_blocks = nn.ModuleList(
            TemporalAttention(width, config.num_heads) if config.temporal == "attention" else TemporalConvolution(width)
            for _ in range(config.attentions_per_block)
        )
        self.norms = nn.ModuleList(LayerNorm(width) for _ in range(config.attentions_per_block))
        self.ff = FeedForward(width)
        self.ff_norm = LayerNorm(width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            encoding = None
            if self.tells_positions:
                encoding = encoding_of(x, frames, norm.weight.dtype, attention.stretch)
            x = x + attention(norm(x, encoding), frames)
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer(nn.Module):
    def __init__(self, channels: int, config: MotionConfig, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6, over_frames=config.norm_over_frames)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(channels, config) for _ in range(config.num_transformer_blocks)
        )
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)  # a fresh module is the identity
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: ((b f), c, h, w)."""
        tokens = self.proj_in(rearrange(self.norm(x, frames), "n c h w -> n (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, frames)
        return x + rearrange(self.proj_out(tokens), "n (h w) c -> n c h w", h=x.shape[-2])


class MotionModule(nn.Module):
    """Mixes the frames of a clip at every pixel. A freshly built one changes nothing."""

    def __init__(self, channels: int, config: MotionConfig, *, groups: int = 32):
        super().__init__()
        self.single_frames = config.single_frames
        self.temporal_transformer = TemporalTransformer(channels, config, groups)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: ((b f), channels, h, w), the same shape out."""
        return self.temporal_transformer(x, frames) if frames > 1 or self.single_frames else x
