"""Clips of the built-in world as latents and tokens, encoded once and read from memory by every later step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from animatediff.data.shapes import make_scene, render
from animatediff.models.text import Tokenizer
from animatediff.models.vae import VAE

CHUNK = 16  # clips rendered and encoded at a time
FAVOUR = 4.0


class LatentClips:
    """`count` clips of a series: latents (n, 16, c, h, w) float16, scaled, and caption tokens (n, 77) int32."""

    def __init__(self, latents: Tensor, tokens: Tensor, empty: Tensor, weights: Tensor | None = None):
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.weights = torch.ones(len(latents)) if weights is None else weights  # (n,): how often each is drawn

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (count,) of clips, drawn by their weights."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def captions(self, index: Tensor, generator: torch.Generator, *, dropout: float) -> Tensor:
        """Tokens (b, 77) of clips `index` (b,), a share `dropout` of them replaced by those of the empty caption."""
        dropped = torch.rand(len(index), 1, generator=generator) < dropout
        return torch.where(dropped, self.empty, self.tokens[index]).long()

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        path: Path,
        vae: VAE,
        *,
        count: int,
        seed: int = 0,
        favoured: Sequence[str] = (),
        max_length: int = 77,
        log: Callable[[str], None] = print,
    ) -> LatentClips:
        """Read the clips at `path`, or render and encode them and write that file.

        Clips of the `favoured` motions are drawn `FAVOUR` times as often as others.
        """
        tokenizer = Tokenizer()
        scenes = [make_scene(i, seed=seed) for i in range(count)]
        weights = torch.tensor([FAVOUR if scene.motion in favoured else 1.0 for scene in scenes])
        empty = tokenizer([""], max_length=max_length)[0, 0].int()
        if path.exists():
            state = torch.load(path, weights_only=True, mmap=True)
            if state["count"] == count and state["seed"] == seed:
                return cls(state["latents"], state["tokens"], empty, weights)
        tokens = tokenizer([s.caption for s in scenes], max_length=max_length)[:, 0].int()
        parts = []
        for start in range(0, count, CHUNK):
            video = render(scenes[start : start + CHUNK])
            parts.append(vae.encode_video(video, chunk_frames=64).half())
            if start % (CHUNK * 32) == 0:
                log(f"encoded {start}/{count} clips")
        latents = torch.cat(parts)
        temporary = path.with_suffix(".tmp")
        torch.save({"count": count, "seed": seed, "latents": latents, "tokens": tokens}, temporary)
        os.replace(temporary, path)
        return cls(latents, tokens, empty, weights)
