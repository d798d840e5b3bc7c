"""The calls of one guided step of the SD-1.5-sized video UNet, read off the network itself on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from animatediff.config.networks import MOTION_VERSIONS, UNetConfig
from animatediff.models.attention import GEGLU, Attention
from animatediff.models.layers import GroupNorm, LayerNorm
from animatediff.models.motion import TemporalAttention
from animatediff.models.unet import UNet

CLIPS = {  # frames, pixels a side
    "16f-512": (16, 512),
    "24f-512": (24, 512),
    "16f-768": (16, 768),
    "16f-256": (16, 256),
    "16f-512-pooled": (16, 512),  # GroupNorm alone, over the frames of a clip: as in v1 and in diffusers
}
CONFIG = UNetConfig(motion=MOTION_VERSIONS["v2"])
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """One kind of call.

    Attributes:
        op: name of the operation.
        clip: key of CLIPS.
        layer: the first layer that makes it.
        sizes: what `ops.OPS[op]` builds its inputs from.
        calls: how many layers make it.
    """

    op: str
    clip: str
    layer: str
    sizes: tuple[tuple[str, int], ...]
    calls: int = 1


def _attention(module: Attention, args: tuple, kwargs: dict) -> tuple[str, dict[str, int]]:
    x, context = args[0], args[1] if len(args) > 1 else args[0]
    sizes = {"images": x.shape[0], "rows": context.shape[0], "tokens": x.shape[1], "keys": context.shape[1]}
    return "attention", sizes | {"heads": module.num_heads, "head_dim": x.shape[2] // module.num_heads}


def _temporal(module: TemporalAttention, args: tuple, kwargs: dict) -> tuple[str, dict[str, int]]:
    (n, tokens, width), frames = args[0].shape, args[1]
    sizes = {"clips": n // frames, "frames": frames, "tokens": tokens}
    return "temporal_attention", sizes | {"heads": module.num_heads, "head_dim": width // module.num_heads}


def _group_norm(module: GroupNorm, args: tuple, kwargs: dict) -> tuple[str, dict[str, int]]:
    n, channels, height, width = args[0].shape
    frames = args[1] if module.over_frames else 1
    sizes = {"images": n, "channels": channels, "height": height, "width": width, "groups": module.num_groups}
    sizes |= {"frames": frames, "silu": int(kwargs.get("silu", False))}
    return "group_norm_silu", sizes | {"shift": int(kwargs.get("shift") is not None)}


def _layer_norm(module: LayerNorm, args: tuple, kwargs: dict) -> tuple[str, dict[str, int]]:
    n, tokens, width = args[0].shape
    return "layer_norm", {"images": n, "tokens": tokens, "width": width, "frames": len(args[1]) if args[1:] else 0}


def _geglu(module: GEGLU, args: tuple, kwargs: dict) -> tuple[str, dict[str, int]]:
    images, tokens, _ = args[0].shape
    return "geglu", {"images": images, "tokens": tokens, "width": module.proj.out_features // 2}


def _linear_geglu(module: GEGLU, args: tuple, kwargs: dict) -> tuple[str, dict[str, int]]:
    _, sizes = _geglu(module, args, kwargs)
    return "linear_geglu", sizes | {"width": module.proj.in_features, "inner": sizes["width"]}


READERS = (
    (Attention, _attention),
    (TemporalAttention, _temporal),
    (GroupNorm, _group_norm),
    (LayerNorm, _layer_norm),
    (GEGLU, _geglu),
    (GEGLU, _linear_geglu),
)


def trace(clip: str) -> list[Shape]:
    """All kinds of calls of one guided step, in the order of their first layers."""
    frames, side = CLIPS[clip]
    pooled = clip.endswith("-pooled")
    found: dict[tuple, Shape] = {}

    def note(name: str, op: str, sizes: dict[str, int]) -> None:
        key = op, tuple(sizes.items())
        known = found.get(key)
        found[key] = replace(known, calls=known.calls + 1) if known else Shape(op, clip, name, key[1])

    def reader(name: str, read: Any):
        return lambda module, args, kwargs: note(name, *read(module, args, kwargs))

    with torch.device("meta"):
        motion = replace(MOTION_VERSIONS["v2"], norm_over_frames=pooled, resnet_norm_over_frames=pooled)
        unet = UNet(CONFIG.with_motion(motion))
        latents = torch.empty(2, frames, CONFIG.in_channels, side // 8, side // 8)
        inputs = latents, torch.empty(2), torch.empty(2, TEXT_TOKENS, CONFIG.context_dim)
    for name, module in unet.named_modules():
        for kind, read in READERS:
            if type(module) is kind and (kind is GroupNorm or not pooled):
                module.register_forward_pre_hook(reader(name, read), with_kwargs=True)
    with torch.no_grad():
        unet(*inputs)
    return list(found.values())
