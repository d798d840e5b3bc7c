"""How a SparseCtrl encoder learns (arXiv 2311.16933): from clips of which a few random frames are given."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from animatediff.models.sparsectrl_encoder import SparseCtrl
from animatediff.training.diffusion_stages import DiffusionStage
from animatediff.training.losses import Denoise


def draw_given(clips: int, frames: int, generator: torch.Generator) -> Tensor:
    """Which frames of each clip are given, bool (clips, frames).

    As in the paper: how many, from one to all, each number as likely; then which, each set of so many as likely.
    """
    count = torch.randint(1, frames + 1, (clips, 1), generator=generator)
    place = torch.rand(clips, frames, generator=generator).argsort(dim=1).argsort(dim=1)
    return place < count


class SparseCtrlStage(DiffusionStage):
    """`trainable` is the encoder; what it adds goes into the frozen network, through which its gradients come.

    The given frames of an rgb condition are the clean latents themselves: sources encode to the posterior's mean, as
    does the pipeline with the images that it is given.
    """

    trainable: SparseCtrl

    def denoiser(self, x0: Tensor, context: Tensor, generator: torch.Generator) -> Denoise:
        given = draw_given(*x0.shape[:2], generator).to(x0.device)
        shown = x0
        if self.trainable.config.kind == "scribble":
            assert self.clips.condition is not None
            shown = self.clips.condition[:, :, None].expand(-1, -1, 3, -1, -1).to(x0)
        condition = (shown * given[:, :, None, None, None]).flatten(0, 1)
        embedded = rearrange(self.trainable.embed(condition, given.flatten()), "(b f) ... -> b f ...", b=len(x0))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            down, mid = self.trainable(embedded, t, context)
            return self.unet(x, t, context, down_residuals=down, mid_residual=mid)

        return denoise


def unfreeze_sparsectrl(encoder: SparseCtrl) -> SparseCtrl:
    """Of a frozen encoder: all is trained but the weights of `conv_in`.

    Their input is zero, so they have neither effect nor gradient; they stay the image model's, as the files want them.
    """
    encoder.requires_grad_(True)
    encoder.conv_in.weight.requires_grad_(False)
    return encoder
