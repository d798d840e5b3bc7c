"""What SDXL is told beside the text: its pooled embedding, and the picture's sizes (arXiv 2307.01952, sec. 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from animatediff.config.networks import Recipe
from animatediff.config.request import Request
from animatediff.features.prompt_travel import Context, PooledContext, text_of_frames

SIZES = ("original_size", "crop", "target_size")


def added_conditioning(
    contexts: dict[str, Context], request: Request, recipe: Recipe, *, refiner: bool, like: Tensor
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Further inputs of `UNet.forward` for the frames (w,) that it sees; none for SD 1.x.

    Args:
        contexts: of the parts of the batch, by their names.
        recipe: of the model's family.
        refiner: the network is SDXL's refiner.
        like: a weight of the network, for device and type.
    """
    pooled = [c.pooled for c in contexts.values() if isinstance(c, PooledContext)]
    if not pooled:
        return lambda frames: {}
    numbers = [time_ids(request, recipe, score=_score(request, part) if refiner else None) for part in contexts]
    rows = torch.tensor(numbers, dtype=torch.float32, device=like.device)
    ids = rows.repeat_interleave(len(pooled[0]), dim=0)
    of_frames = text_of_frames(pooled, like=like)  # with one token each: (b, 1, d) or (b, w, 1, d)
    return lambda frames: {"pooled": of_frames(frames).squeeze(-2), "time_ids": ids}


def time_ids(request: Request, recipe: Recipe, *, score: float | None = None) -> list[float]:
    """Original size, crop, target size, each height (or top) first, as the family has learnt them.

    Args:
        score: the refiner's aesthetic score, which it has in the place of the target size.
    """
    options, size = request.micro_conditioning, (request.size.height, request.size.width)
    defaults = recipe.sizes or (size, (0, 0), size)
    pairs = []
    for name, default in zip(SIZES, defaults, strict=True):
        chosen = getattr(options, name)
        pairs.append(default if chosen is None else chosen[::-1] if recipe.width_first else chosen)
    return [*pairs[0], *pairs[1], *(pairs[2] if score is None else (score,))]


def _score(request: Request, part: str) -> float:
    options = request.micro_conditioning
    return options.negative_aesthetic_score if part == "unconditional" else options.aesthetic_score
