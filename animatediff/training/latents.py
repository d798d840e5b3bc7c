"""Clips as latents and tokens: encoded once and kept in a file, or read from videos and encoded as they are needed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from animatediff.media.scribble import draw_scribbles, pack, unpack
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.vae import VAE
from animatediff.training.data.reader import ClipBatch, ClipReader
from animatediff.training.distributed import rank_and_world_size
from animatediff.training.output_folder import read_tensors, write_tensors
from animatediff.world.series import World

CAPTION_DROPOUT = 0.1  # fraction of empty captions, which teaches the unconditional half of guidance
CHUNK = 16  # clips rendered and encoded at a time
OVERSAMPLING = 4.0  # how many times as often an oversampled motion is drawn

Log = Callable[[str], None]


@dataclass(frozen=True)
class Condition:
    """What a stage sees of every frame beside its latents.

    Attributes:
        key: of clips that are kept with it; another one where it is made differently.
        make: video (b, f, 3, H, W) in [-1, 1] -> (b, f, …), bool or floating point, without gradients.
    """

    key: Mapping[str, Any]
    make: Callable[[Tensor], Tensor]


SCRIBBLES = Condition({"scribbled": 2}, draw_scribbles)  # bool (b, f, H, W), white lines on black


class LatentClips:
    """Latents (n, f, c, h, w) float16, scaled, and caption tokens (n, 77) int32 of clips, read from memory.

    Attributes:
        weights: how often each is drawn, relative to the others.
        single_frames: whether a batch has one random frame of each clip.
        names: of the clips of the last batch.
        condition: of the last batch, where the clips have one, see `Condition`.
    """

    def __init__(
        self,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        conditions: Tensor | None = None,
        files: Sequence[str] = (),
    ):
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.conditions = conditions  # of all clips; bool ones are packed
        self.files = files  # that each clip is from; none in Shapes, the toy data set
        self.condition: Tensor | None = None
        self.weights, self.single_frames = torch.ones(len(latents)), False
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (count,) of clips, by their weights."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def captions(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens (b, 77) of clips `index` (b,), some replaced by those of the empty caption."""
        return drop_captions(self.tokens[index], self.empty, generator)

    def batch(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips drawn by `generator`: a `ClipSource`."""
        which = self.draw(batch_size, generator)
        self.names = [self.files[i] if self.files else f"clip {i}" for i in which.tolist()]
        frames = torch.arange(self.latents.shape[1])[None]
        if self.single_frames:
            frames = torch.randint(self.latents.shape[1], (batch_size,), generator=generator)[:, None]
        if self.conditions is not None:
            self.condition = self.conditions[which[:, None], frames]
            if self.condition.dtype == torch.uint8:
                downsampling = self.condition.shape[-2] // self.latents.shape[-2]
                self.condition = unpack(self.condition, downsampling * self.latents.shape[-1])
        return self.latents[which[:, None], frames].float(), self.captions(which, generator)

    def close(self) -> None:
        """Nothing is open: they are in memory."""

    @classmethod
    def of_world(
        cls, path: Path, vae: VAE, world: World, *, condition: Condition | None = None, log: Log = print
    ) -> LatentClips:
        """Clips of Shapes; oversampled motions are drawn more often."""
        clips = cls.build(
            path,
            world_key(world, vae),
            (ClipBatch(*world.render(numbers), []) for numbers in in_chunks(world.clips)),
            vae,
            Tokenizer(),
            count=world.clips,
            chunk_frames=64,
            condition=condition,
            log=log,
        )
        motions = (world.scene(i).motion for i in range(world.clips))
        clips.weights = torch.tensor([OVERSAMPLING if motion in world.oversampled else 1.0 for motion in motions])
        return clips

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        path: Path,
        key: dict[str, Any],
        batches: Iterable[ClipBatch],
        vae: VAE,
        tokenizer: Tokenizer,
        *,
        count: int,
        chunk_frames: int = 16,
        condition: Condition | None = None,
        log: Log = print,
    ) -> LatentClips:
        """Read the clips at `path`, or encode `batches` and write that file.

        Args:
            path: the file.
            key: what the clips were made from; a file of another key is replaced.
            batches: `count` clips in all.
            vae, tokenizer: of the image model.
            chunk_frames: pictures encoded at a time.
            condition: made of them, too.
            log: told how far it is.
        """
        empty = tokenize(tokenizer, [""])[0]
        key = {**key, **condition.key} if condition else key
        if state := made_from(path, key):
            made = state["conditions"] if condition else None
            return cls(state["latents"], state["tokens"], empty, made, state.get("files", ()))
        latents, tokens, conditions, files, done = [], [], [], [], 0
        for number, (video, captions, names) in enumerate(batches):
            latents.append(encode(vae, video, chunk_frames=chunk_frames).half().cpu())
            tokens.append(tokenize(tokenizer, captions))
            if condition:
                seen = condition.make(video.to(vae.quant_conv.weight.device))
                conditions.append(pack(seen) if seen.dtype == torch.bool else seen.half().cpu())
            files += names
            done += len(captions)
            if number % 32 == 0 or done == count:
                log(f"encoded {done}/{count} clips")
        clips = cls(torch.cat(latents), torch.cat(tokens), empty, torch.cat(conditions) if condition else None, files)
        drawn = {"conditions": clips.conditions} if condition else {}
        write_tensors(path, {**key, "latents": clips.latents, "tokens": clips.tokens, "files": files, **drawn})
        return clips


def world_key(world: World, vae: VAE) -> dict[str, Any]:
    """What latents of Shapes are made from: the clips, and the weights that encode them, as a file has them."""
    digest = hashlib.sha256(repr(vae.config.scaling_factor).encode())
    for name, weight in vae.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(weight.detach().half().cpu().numpy().tobytes())
    return {"world": world.key(), "vae": digest.hexdigest()}


def made_from(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The clips of `key` that `path` holds, if it is there and does."""
    if not path.exists():
        return None
    state = read_tensors(path, keys={"latents", "tokens"}, remedy="which encodes the clips again")
    return state if all(state.get(name) == value for name, value in key.items()) else None


class StreamedClips:
    """Clips of files, encoded as they are needed: micro-batch `index` of size b begins with clip b * index."""

    def __init__(self, reader: ClipReader, vae: VAE, tokenizer: Tokenizer, *, condition: Condition | None = None):
        self.reader, self.vae, self.tokenizer = reader, vae, tokenizer
        self.made = condition
        self.condition: Tensor | None = None
        self.names: list[str] = []
        self.empty = tokenize(tokenizer, [""])[0]
        self._batches: Generator[ClipBatch] | None = None
        self._next: tuple[int, int] | None = None  # micro-batch that `_batches` gives next, and its size

    def batch(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips of the series: a `ClipSource`."""
        processes = rank_and_world_size()[1]
        if self._next != (index, batch_size):  # the first, from which on they are read ahead
            self.close()
            micro_batches = itertools.count(index, processes)
            self._batches = self.reader.batches(range(i * batch_size, (i + 1) * batch_size) for i in micro_batches)
        video, captions, self.names = next(self._batches)
        self._next = (index + processes, batch_size)
        with torch.no_grad():
            latents = encode(self.vae, video).float()
            if self.made:
                self.condition = self.made.make(video.to(self.vae.quant_conv.weight.device))
        return latents, drop_captions(tokenize(self.tokenizer, captions), self.empty, generator)

    def close(self) -> None:
        """End the processes that read ahead: at once, where the garbage collector would wait for them."""
        if self._batches:
            self._batches.close()


def in_chunks(count: int) -> Iterator[range]:
    """The numbers of `count` clips, CHUNK at a time."""
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def encode(vae: VAE, video: Tensor, *, chunk_frames: int = 16) -> Tensor:
    """Scaled latents (b, f, c, h, w) of a video (b, f, 3, H, W), on the VAE's device: the posterior's mean.

    Their layout is torch's default, which activations then follow: in channels_last, torch 2.13's GroupNorm crashes on
    the CPU in the backward pass of the first layer that trains, whose input needs no gradient.
    """
    return vae.encode_video(video.to(vae.quant_conv.weight.device), chunk_frames=chunk_frames).contiguous()


def tokenize(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """Tokens (n, 77) int32 of captions; what goes beyond 75 tokens is cut off, as SD 1.x was trained."""
    return tokenizer(captions)[:, 0].int()


def drop_captions(tokens: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (b, l) int64, a fraction CAPTION_DROPOUT of the rows replaced by `empty` (l,)."""
    dropped = torch.rand(len(tokens), 1, generator=generator) < CAPTION_DROPOUT
    return torch.where(dropped, empty, tokens).long()
