"""Prompts that travel: texts at keyframes, and for the frames between them mixtures of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from animatediff.config.request import Travel

PARALLEL = 0.9995  # |cosine| above which slerp is lerp: the angle is lost in rounding


def travel_context(
    travel: Travel, texts: Tensor, keyframes: Sequence[int], frames: int, *, loop: bool = False
) -> FrameContext:
    """The context of one clip. Every frame is a mixture of the two texts around it, never of other mixtures.

    Args:
        travel: how.
        texts: embeddings (k, l, d), one for each keyframe.
        keyframes: their frames, rising, each within 0 … frames - 1.
        frames: of the clip.
        loop: where `travel.loop` does not say.
    """
    before, after, r = _course(travel, keyframes, frames, loop=loop if travel.loop is None else travel.loop)
    a, b = 1 - r, r
    if travel.interpolation == "slerp":
        flat = F.normalize(texts.flatten(1).cpu().double(), dim=1)
        cosine = (flat @ flat.mT)[before, after]
        angle = cosine.clamp(-1, 1).acos()
        turned = cosine.abs() <= PARALLEL
        a, b = (torch.where(turned, (part * angle).sin() / angle.sin(), part) for part in (a, b))
    index = torch.arange(len(keyframes))
    weights = a[:, None] * (before[:, None] == index) + b[:, None] * (after[:, None] == index)
    return FrameContext(texts, weights[None].float())


def _course(travel: Travel, keyframes: Sequence[int], frames: int, *, loop: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of every frame (frames,): the keyframes before and after it, and how far it is from the one to the other."""
    at, frame, last = torch.tensor(keyframes), torch.arange(frames), len(keyframes) - 1
    before = torch.searchsorted(at, frame, right=True) - 1
    before, after = (i % (last + 1) if loop else i.clamp(0, last) for i in (before, before + 1))
    gap, gone = ((f - at[before]) % frames for f in (at[after], frame))
    r = torch.where(gap > 0, gone.double() / gap, 0.0)
    return before, after, ((r - travel.fixed_ratio) / (1 - travel.fixed_ratio)).clamp(min=0)


@dataclass(frozen=True)
class FrameContext:
    """Text embeddings that differ from frame to frame. Kept as the few keys they are mixed of, whatever the length.

    Attributes:
        keys: (n, l, d).
        weights: how much of each key is in each frame, float32 (b, f, n).
    """

    keys: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def at(self, frames: Tensor) -> Tensor:
        """The embeddings of some frames (w,) by their numbers: (b, w, l, d)."""
        weights = self.weights[:, frames.to(self.weights.device)].to(self.keys)
        return torch.einsum("bwn,nld->bwld", weights, self.keys)


@dataclass(frozen=True)
class PooledContext:
    """What SDXL is told of the text: the tokens of both encoders, and the pooled vector as a text of one token."""

    tokens: Tensor | FrameContext
    pooled: Tensor | FrameContext

    def __len__(self) -> int:
        return len(self.tokens)


Context = Tensor | FrameContext | PooledContext  # (b, l, d): one text for all frames of a clip


def join(contexts: Sequence[FrameContext]) -> FrameContext:
    """The clips of several contexts of equal (f, l, d), one after the other."""
    total, start, weights = sum(len(c.keys) for c in contexts), 0, []
    for c in contexts:
        weights.append(F.pad(c.weights, (start, total - start - len(c.keys))))
        start += len(c.keys)
    return FrameContext(torch.cat([c.keys for c in contexts]), torch.cat(weights))


def text_of_frames(contexts: Sequence[Context], *, like: Tensor) -> Callable[[Tensor], Tensor]:
    """What a network is told about the frames (w,) that it sees, as `UNet.forward` takes it.

    Args:
        contexts: of as many clips each, all of one kind; joined along the batch.
        like: a weight of the network, for device and type.

    Returns:
        frame numbers (w,) -> (b, l, d), or (b, w, l, d) where the text differs from frame to frame.
    """
    contexts = [c.tokens if isinstance(c, PooledContext) else c for c in contexts]
    if isinstance(contexts[0], FrameContext):
        both = join([c for c in contexts if isinstance(c, FrameContext)])
        return FrameContext(both.keys.to(like), both.weights.to(like.device)).at
    text = torch.cat([c for c in contexts if isinstance(c, Tensor)]).to(like)
    return lambda frames: text
