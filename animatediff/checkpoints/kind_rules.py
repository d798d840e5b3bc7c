"""How kinds of weight files are told from their keys and shapes: rules, of which `file_kinds` makes its table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from torch import Tensor

from animatediff.checkpoints.files import StateDict
from animatediff.checkpoints.keymaps import is_motion, motion_to_official
from animatediff.checkpoints.lora_keys import lora_targets

Rule = Callable[[StateDict], bool]
EMBEDDING_WIDTHS = (768, 1024, 1280)  # of the text encoders of SD 1.x, SD 2.x, and SDXL's second


def any_key(pattern: str) -> Rule:
    found = re.compile(pattern).search
    return lambda tensors: any(found(key) for key in tensors)


def both(*rules: Rule) -> Rule:
    return lambda tensors: all(rule(tensors) for rule in rules)


def either(*rules: Rule) -> Rule:
    return lambda tensors: any(rule(tensors) for rule in rules)


def sized(pattern: str, axis: int, wanted: Callable[[int], bool]) -> Rule:
    """Whether the first key that matches has a fitting size along `axis`."""
    found = re.compile(pattern).search

    def rule(tensors: StateDict) -> bool:
        tensor = next((t for key, t in tensors.items() if found(key)), None)
        return tensor is not None and tensor.dim() > axis and wanted(tensor.shape[axis])

    return rule


def motion_part(tensors: StateDict) -> StateDict:
    """The motion modules' entries in official names."""
    return {motion_to_official(key.removeprefix("unet.")): tensor for key, tensor in tensors.items() if is_motion(key)}


def embedding_vectors(tensors: StateDict) -> Tensor | None:
    """The vectors (k, d) or (d,) of a textual inversion, None in any other file."""
    vectors = {key: t for key, t in tensors.items() if not key.startswith("string_to_token.")}
    if len(vectors) != 1:
        clip_g = vectors.get("clip_g") if vectors.keys() == {"clip_l", "clip_g"} else None
        return clip_g if clip_g is not None and clip_g.dim() in (1, 2) else None
    ((key, tensor),) = vectors.items()
    named = key in ("emb_params", "clip_l") or key.startswith(("string_to_param.", "<"))
    fits = tensor.dim() in (1, 2) and (named or ("." not in key and tensor.shape[-1] in EMBEDDING_WIDTHS))
    return tensor if fits else None


def is_embedding(width: int | None = None) -> Rule:
    """Whether it is a textual inversion, of this width."""

    def rule(tensors: StateDict) -> bool:
        vectors = embedding_vectors(tensors)
        return vectors is not None and width in (None, vectors.shape[-1])

    return rule


def is_lora(fits: Callable[[set[str]], bool] = bool) -> Rule:
    """Whether it changes layers of our networks, and these fit."""

    def rule(tensors: StateDict) -> bool:
        targets = lora_targets(tensors)
        return bool(targets) and fits(targets)

    return rule


def is_thinned(tensors: StateDict) -> bool:
    """Whether a UNet has other depths of spatial transformers on the way up than down, or none in the middle."""
    block = re.compile(r"(in|out|middle|down|up|mid)(?:put)?_blocks?\..*transformer_blocks\.(?=(\d+)\.)").search
    ways = {"in": "down", "out": "up", "middle": "mid"}
    depths: dict[str, dict[str, int]] = {"down": {}, "up": {}, "mid": {}}
    for match in filter(None, map(block, tensors)):
        way, last = depths[ways.get(match[1], match[1])], int(match[2])
        way[match[0]] = max(last, way.get(match[0], 0))
    down, up = (Counter(depths[way].values()) for way in ("down", "up"))
    same = all(up[depth] * down.total() == down[depth] * up.total() for depth in up | down)
    return bool(up) and (not depths["mid"] or not same)
