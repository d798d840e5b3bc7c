"""Attention over the tokens of a frame, and the spatial transformer of Stable Diffusion (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from animatediff_kernels import attention, geglu, linear_geglu
from animatediff_kernels.cpu import fast_products, on_cpu
from einops import rearrange
from torch import Tensor, nn

from animatediff.config.networks import UNetConfig
from animatediff.models.chunks import Chunked, in_parts
from animatediff.models.layers import Conv, GroupNorm, LayerNorm, is_plain

CPU_ROWS = 2048  # tokens whose feed-forward stays in the cache
CPU_TOKENS = 256  # of an image, from which on a CPU attends faster in float32 than in half precision


class Attention(Chunked):
    """Multi-head attention of tokens (n, s, width) to themselves or to a context (n / r, l, context_dim).

    `image_prompts(q, out)` adds what the queries find in pictures, see `ip_adapter_network`.
    """

    image_prompts: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, width: int, num_heads: int, *, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim or width, width, bias=False)
        self.to_v = nn.Linear(context_dim or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """With a context of fewer rows than x, r = n / rows consecutive rows of x (frames) share each context row."""
        if context is None and self.chunk and self.image_prompts is None:
            return in_parts(lambda x: self._forward(x, None), max(self.chunk // x.shape[1], 1), x)
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        source, q = x if context is None else context, self.to_q(x)
        out = self._attend(q, self.to_k(source), self.to_v(source))
        if self.image_prompts is not None:
            out = self.image_prompts(q, out)
        return self.to_out[0](out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.dtype.itemsize == 2 and on_cpu(q) and not torch.compiler.is_compiling()
        if not half or q.shape[1] < CPU_TOKENS:
            return attention(q, k, v, num_heads=self.num_heads)
        dtype, (q, k, v) = q.dtype, (t.float() for t in (q, k, v))
        with fast_products(q, q.new_empty(q.shape[-1], 0)):
            return attention(q, k, v, num_heads=self.num_heads).to(dtype)

    def identity(self, x: Tensor) -> Tensor:
        """Self-attention in which every token sees itself alone."""
        return self.to_out[0](self.to_v(x))


class GEGLU(nn.Module):
    """Linear to twice the width; the second half, through an exact GELU, gates the first (Shazeer 2020)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.proj, nn.Linear):
            return linear_geglu(x, self.proj.weight, self.proj.bias)
        return geglu(self.proj(x))


class FeedForward(Chunked):
    def __init__(self, width: int, *, mult: int = 4):
        super().__init__()
        # index 1 is the dropout of the original, which has no weights and never drops
        self.net = nn.ModuleList([GEGLU(width, mult * width), nn.Identity(), nn.Linear(mult * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.chunk or x.shape[:2].numel()
        if on_cpu(x) and not torch.is_grad_enabled():
            rows = min(rows, CPU_ROWS)
        if rows >= x.shape[:2].numel():
            return self.net[2](self.net[0](x))
        return in_parts(lambda x: self.net[2](self.net[0](x)), rows, x.flatten(0, 1)).view(x.shape)


class SpatialTransformerBlock(nn.Module):
    """Self-attention within a frame, cross-attention to the text, feed-forward; all pre-norm and residual."""

    def __init__(self, width: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, num_heads, context_dim=context_dim)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, config: UNetConfig, blocks: int):
        super().__init__()
        self.linear_projection = config.linear_projection
        self.norm = GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList(
            SpatialTransformerBlock(channels, config.heads(channels), config.context_dim) for _ in range(blocks)
        )
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear_projection else Conv(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: ((b f), c, h, w); context: (b, l, context_dim), one row per video, or ((b f), l, context_dim)."""
        h, residual = x.shape[-2], x
        x = self.norm(x)
        if not self.linear_projection:
            x = self.proj_in(x)
        x = rearrange(x, "n c h w -> n (h w) c")
        if self.linear_projection:
            x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x, context)
        if self.linear_projection:
            x = self.proj_out(x)
        x = rearrange(x, "n (h w) c -> n c h w", h=h)
        if not self.linear_projection:
            x = self.proj_out(x)
        return x + residual
