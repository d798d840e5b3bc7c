"""IP-Adapter (arXiv 2308.06721): pictures as further tokens of a UNet's cross-attentions, with keys of their own.

Parameter names are those of the released files. What a picture adds to the network lives beside the UNet, which is not
changed; `image_prompted` lets it act for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from animatediff_kernels import attention
from torch import Tensor, nn

from animatediff.config.networks import IPAdapterConfig
from animatediff.models.attention import Attention
from animatediff.models.unet import UNet
from animatediff.utils import UserError

HEAD_WIDTH = 64  # of the resampler's attention

# Weights of layers by the beginnings of their names: the longest that fits decides, and where none does, it is 0. What
# the layers of SD 1.5 are good for comes from cubiq/ComfyUI_IPAdapter_plus, the idea from InstantStyle (2404.02733).
LAYER_PRESETS: dict[str, dict[str, float]] = {
    "all": {"": 1.0},
    "style": {"down_blocks.0": 1.0, "down_blocks.1": 1.0, "up_blocks": 1.0}
    | {"up_blocks.1.attentions.0": 0.0, "up_blocks.1.attentions.1": 0.0},
    "composition": {"down_blocks.2.attentions.0": 0.25, "down_blocks.2.attentions.1": 1.0},
    "strong style": {"": 1.0, "down_blocks.2": 0.0},
}
SDXL_PRESETS: dict[str, dict[str, float]] = {  # style and composition are InstantStyle's
    "all": {"": 1.0},
    "style": {"up_blocks.0.attentions.1": 1.0},
    "composition": {"down_blocks.2.attentions.1": 1.0},
    "strong style": {"": 1.0, "down_blocks.2.attentions.1": 0.0},
}
for _presets in (LAYER_PRESETS, SDXL_PRESETS):
    _presets["style and composition"] = _presets["style"] | _presets["composition"]


class LinearProjection(nn.Module):
    """A picture's embedding as a few tokens (base, light)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.encoder_width, config.tokens * config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class TokenProjection(nn.Module):
    """Every token of a picture for itself (full-face)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        width = config.encoder_width
        layers = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.context_dim)]
        self.proj = nn.Sequential(*layers, nn.LayerNorm(config.context_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)


class PerceiverAttention(nn.Module):
    """Latents look at the tokens of a picture and at themselves."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        inner = num_heads * HEAD_WIDTH
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(tokens), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(latents), k, v, num_heads=self.num_heads))


class Resampler(nn.Module):
    """All tokens of a picture as a few (plus, plus-face); the resampler of Flamingo (arXiv 2204.14198)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        width = config.width
        self.latents = nn.Parameter(nn.init.normal_(torch.empty(1, config.tokens, width), std=width**-0.5))
        self.proj_in = nn.Linear(config.encoder_width, width)
        self.proj_out = nn.Linear(width, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, config.num_heads), _feed_forward(width)])
            for _ in range(config.depth)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        tokens, latents = self.proj_in(hidden), self.latents.expand(len(hidden), -1, -1)
        for attend, feed_forward in self.layers:
            latents = latents + attend(tokens, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


def _feed_forward(width: int) -> nn.Sequential:
    outer = nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), *outer)


PROJECTIONS = {"base": LinearProjection, "plus": Resampler, "full": TokenProjection}


class ImageKeys(nn.Module):
    """Keys and values of image tokens in one cross-attention."""

    def __init__(self, context_dim: int, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapter(nn.Module):
    """`image_proj` makes a picture's tokens; `ip_adapter.N` belongs to the Nth attention of the UNet, see below."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.config = config
        self.image_proj = PROJECTIONS[config.variant](config)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): ImageKeys(config.context_dim, width) for i, width in enumerate(config.layer_widths)}
        )

    def forward(self, features: Tensor) -> Tensor:
        """Tokens (n, l, context_dim) of n pictures.

        Args:
            features: of the image encoder. base: its embeddings (n, encoder_width), zeros for the unconditional half;
                plus and full: its second-to-last hidden state (n, tokens, encoder_width), that of zero pixel values
                for the unconditional half.
        """
        return self.image_proj(features)


def build_ip_adapter(
    unet: UNet, variant: Literal["base", "plus", "full"], *, encoder_width: int, tokens: int = 4
) -> IPAdapter:
    """A fresh IP-Adapter for an image model, on its device and in its dtype; keys and values begin as the text's.

    Args:
        encoder_width: of what it sees of a picture, see `IPAdapter.forward`.
        tokens: that a picture becomes; full has as many as the encoder.
    """
    layers = cross_attentions(unet)
    widths = tuple(layer.to_q.weight.shape[0] for layer in layers.values())
    config = IPAdapterConfig(
        variant, encoder_width=encoder_width, context_dim=unet.config.context_dim, layer_widths=widths, tokens=tokens
    )
    adapter = IPAdapter(config).to(unet.conv_in.weight)
    for keys, layer in zip(adapter.ip_adapter.values(), layers.values(), strict=True):
        keys.to_k_ip.load_state_dict(layer.to_k.state_dict())
        keys.to_v_ip.load_state_dict(layer.to_v.state_dict())
    return adapter


def cross_attentions(unet: UNet) -> dict[str, Attention]:
    """A UNet's cross-attentions by name, in the files' order: down, up, and the middle block last.

    A file numbers them 1, 3, …: self-attentions, which have no entries, count too.
    """
    found = {}
    for block in ("down_blocks", "up_blocks", "mid_block"):
        found |= {f"{block}.{n}": m for n, m in getattr(unet, block).named_modules() if n.endswith(".attn2")}
    return found


def layer_weights(unet: UNet, layers: str | Mapping[str, float]) -> list[float]:
    """The weight of every cross-attention, in their order.

    Args:
        layers: a key of LAYER_PRESETS, or weights by the beginnings of names, such as {"mid_block": 0.5}.

    Raises:
        UserError: a beginning that no cross-attention has.
    """
    presets = SDXL_PRESETS if unet.config.added_channels else LAYER_PRESETS
    weights, names = presets[layers] if isinstance(layers, str) else layers, list(cross_attentions(unet))
    if not isinstance(layers, str):
        strange = [start for start in weights if not any(f"{name}.".startswith(f"{start}.") for name in names)]
        if strange:
            blocks = sorted({".".join(name.split(".")[: 1 + (not name.startswith("mid"))]) for name in names})
            raise UserError(f"layers: got {strange[0]!r}, expected beginnings of layers, such as {', '.join(blocks)}")

    def weight(name: str) -> float:
        fitting = [start for start in weights if start == "" or f"{name}.".startswith(f"{start}.")]
        return weights[max(fitting, key=len)] if fitting else 0.0

    return [weight(name) for name in names]


class ImagePrompt:
    """The pictures of one adapter as a UNet's cross-attentions see them, window by window.

    Args:
        adapter: on its device, in its dtype.
        tokens: (p, f, l, context_dim): for each part of the batch (unconditional, conditional, …) and for each frame
            of the clip, or with f = 1 the same for all frames.
        layers: weight of every cross-attention, in the order of `cross_attentions`.
        mask: (H, W) in [0, 1], of any size: where the pictures act.
    """

    def __init__(
        self, adapter: IPAdapter, tokens: Tensor, *, layers: Sequence[float] | None = None, mask: Tensor | None = None
    ):
        self.keys = list(adapter.ip_adapter.values())
        self.tokens = tokens
        self.layers = [1.0] * len(self.keys) if layers is None else list(layers)
        self.mask = mask
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # tokens that are alike in all frames: the steps share them
        self._frames = torch.zeros(1, dtype=torch.long)
        self._scale = torch.zeros(1)
        self._grids: list[tuple[int, int]] = []

    def select(self, frames: Tensor, scale: Tensor, size: tuple[int, int], levels: int) -> None:
        """What the next call of the network is about.

        Args:
            frames: numbers (w,) of the frames that it sees.
            scale: (w,), 1 is as trained.
            size: (h, w) of the latents.
            levels: resolutions of the UNet.
        """
        self._frames, self._scale = frames.cpu(), scale
        self._grids = [(-(-size[0] // 2**level), -(-size[1] // 2**level)) for level in range(levels)]

    @property
    def active(self) -> bool:
        return bool(self._scale.any())

    def attend(self, i: int, level: int, q: Tensor, num_heads: int) -> Tensor:
        """What the ith cross-attention adds before its `to_out`, for queries q ((p b f), s, width)."""
        rows = len(q) // len(self.tokens)  # of a part of the batch
        k, v = self._keys_and_values(i, rows)
        out = attention(q, k, v, num_heads=num_heads)
        factor = (self.layers[i] * self._scale).to(out).repeat(len(q) // len(self._scale))[:, None, None]
        if self.mask is not None:
            grid = F.interpolate(self.mask.to(out)[None, None], size=self._grids[level], mode="bilinear")
            factor = factor * grid.flatten()[:, None]
        return out * factor

    def _keys_and_values(self, i: int, rows: int) -> tuple[Tensor, Tensor]:
        if self.tokens.shape[1] > 1:
            tokens = self.tokens[:, self._frames]
            videos = rows // tokens.shape[1]
            return self.keys[i](tokens.repeat_interleave(videos, dim=0).flatten(0, 1))
        if i not in self._cache:
            self._cache[i] = self.keys[i](self.tokens[:, 0])
        return self._cache[i]


@contextmanager
def image_prompted(unet: UNet, prompts: Sequence[ImagePrompt]) -> Iterator[None]:
    """Let pictures act in the cross-attentions: the sum of what all prompts add. They share the text's queries."""
    levels = len(unet.config.block_out_channels)
    with ExitStack() as stack:
        for i, (name, layer) in enumerate(cross_attentions(unet).items()):
            used = [prompt for prompt in prompts if prompt.layers[i] != 0]
            if used:
                layer.image_prompts = _sum_of(used, i, _level(name, levels), layer.num_heads)
                stack.callback(setattr, layer, "image_prompts", None)
        yield


def _sum_of(prompts: Sequence[ImagePrompt], i: int, level: int, num_heads: int):
    def add(q: Tensor, out: Tensor) -> Tensor:
        for prompt in prompts:
            if prompt.active:
                out = out + prompt.attend(i, level, q, num_heads)
        return out

    return add


def _level(name: str, levels: int) -> int:
    """Of a layer; 0 is the highest resolution."""
    block, number = name.split(".")[:2]
    if block == "mid_block":
        return levels - 1
    return int(number) if block == "down_blocks" else levels - 1 - int(number)
