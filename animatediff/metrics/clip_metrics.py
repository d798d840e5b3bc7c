"""Text alignment, domain similarity and frame consistency: cosines of CLIP embeddings, times 100.

The three numbers of AnimateDiff's Table 1 (arXiv 2307.04725). The paper gives no formulas; ours are means over all
pairs, and means over clips are taken after them. They depend on the encoder: compare only numbers of the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from animatediff.utils import UserError

CHUNK = 32  # pictures encoded at a time


class Encoder(Protocol):
    """Pictures and texts to vectors of length one in one space, such as CLIP."""

    name: str  # for reports: which weights these are

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit embeddings (n, d), float32 on the CPU, of pictures (n, 3, H, W) in [-1, 1] of any size."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d), float32 on the CPU, of texts."""
        ...


@dataclass(frozen=True)
class ClipMetrics:
    """Of one clip, each in [-100, 100]; None where the question makes no sense."""

    text_alignment: float | None  # None without a prompt
    domain_similarity: float | None  # None without reference images
    frame_consistency: float | None  # None for a single frame


def measure_clip(
    video: Tensor, encoder: Encoder, *, prompt: str | None = None, references: Tensor | None = None
) -> ClipMetrics:
    """All three numbers of a clip.

    Args:
        video: (f, 3, H, W) in [-1, 1].
        encoder: see `Encoder`.
        prompt: of the clip.
        references: unit embeddings (r, d) of pictures that the same personalised model made without motion.
    """
    frames = encode_frames(encoder, video)
    return ClipMetrics(
        text_alignment=text_alignment(frames, encoder.encode_texts([prompt])[0]) if prompt else None,
        domain_similarity=None if references is None else domain_similarity(frames, references),
        frame_consistency=frame_consistency(frames) if len(frames) > 1 else None,
    )


def text_alignment(frames: Tensor, text: Tensor) -> float:
    """Mean cosine of a clip's frames and its prompt, times 100. Unit embeddings (f, d) and (d,)."""
    return 100 * float((frames @ text).mean())


def domain_similarity(frames: Tensor, references: Tensor) -> float:
    """Mean cosine of each frame and each reference image, times 100. Unit embeddings (f, d) and (r, d)."""
    return 100 * float((frames @ references.T).mean())


def frame_consistency(frames: Tensor) -> float:
    """Mean cosine of neighbouring frames, times 100. Unit embeddings (f, d).

    Raises:
        UserError: fewer than two frames.
    """
    if len(frames) < 2:
        raise UserError(f"got {len(frames)} frames, expected at least two: one has no neighbour")
    return 100 * float((frames[1:] * frames[:-1]).sum(dim=1).mean())


def encode_frames(encoder: Encoder, video: Tensor) -> Tensor:
    """Unit embeddings (f, d) of a clip (f, 3, H, W) in [-1, 1], a few frames at a time."""
    return torch.cat([encoder.encode_images(frames) for frames in video.split(CHUNK)])
