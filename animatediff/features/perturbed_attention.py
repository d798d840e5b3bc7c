"""Perturbed-attention guidance (arXiv 2403.17377): a prediction without spatial self-attention, to guide away from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from animatediff.checkpoints.load import ImageModel
from animatediff.config.request import Request
from animatediff.features.feature import FrameDenoise, Run
from animatediff.models.attention import Attention, SpatialTransformerBlock
from animatediff.models.unet import UNet
from animatediff.utils import UserError


@contextmanager
def perturbed_attention(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`pag`: the last part of the batch is predicted with perturbed attention; `diffusion.guidance` uses it."""
    if "perturbed" not in run.parts:
        yield denoise
        return
    with attention_perturbed(run.model.unet, run.request.pag.layers, len(run.parts)):
        yield denoise


@contextmanager
def attention_perturbed(unet: UNet, layers: Sequence[str], parts: int) -> Iterator[None]:
    """Give the last of `parts` equal parts of the batch an identity for its self-attention maps (Eq. 13).

    Temporal attention stays as it is: the frames of the perturbed part still know each other.

    Args:
        layers: beginnings of the names of blocks, such as "mid_block" or "up_blocks.1.attentions.0".

    Raises:
        UserError: no spatial self-attention is below one of the layers.
    """

    def hook(module: Attention, args: tuple[Tensor], out: Tensor) -> Tensor:
        kept = len(out) - len(out) // parts
        return torch.cat([out[:kept], module.identity(args[0][kept:])])

    with ExitStack() as stack:
        for attention in find_attentions(unet, layers):
            stack.callback(attention.register_forward_hook(hook).remove)
        yield


def load(request: Request, headers: Any, image: ImageModel, unet: UNet) -> None:
    """No network of its own. Raises: UserError where the UNet has no such layers."""
    if request.pag.scale:
        find_attentions(unet, request.pag.layers)


def find_attentions(unet: UNet, layers: Sequence[str]) -> list[Attention]:
    """The spatial self-attentions below these layers. Raises: UserError where there are none."""
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, SpatialTransformerBlock)}
    found: dict[str, Attention] = {}
    for layer in layers:
        below = {name: m.attn1 for name, m in blocks.items() if f"{name}.".startswith(f"{layer}.")}
        if not below:
            known = sorted({".".join(name.split(".")[: 1 + name.startswith(("down", "up"))]) for name in blocks})
            raise UserError(f"pag_layers: got {layer!r}, expected layers with attention, such as {', '.join(known)}")
        found |= below
    return list(found.values())
