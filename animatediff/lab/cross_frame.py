"""Text2Video-Zero's cross-frame attention (arXiv 2303.13439): frames of other noise show the same things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from animatediff.models.attention import SpatialTransformerBlock
from animatediff.models.unet import UNet


@contextmanager
def cross_frame_attention(unet: UNet) -> Iterator[None]:
    """Give the self-attention of all frames the keys and values of the first frame of their clip."""
    frames = 1

    def count_frames(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal frames
        frames = args[0].shape[1]

    def attend_to_first(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], args[0][::frames]  # a context of one row per clip

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(count_frames).remove)
        for module in unet.modules():
            if isinstance(module, SpatialTransformerBlock):
                stack.callback(module.attn1.register_forward_pre_hook(attend_to_first).remove)
        yield
