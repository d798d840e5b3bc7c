"""LoRAs without names: the lists of tensors that MotionDirector (arXiv 2310.08465) and early trainers write.

Such a list has the two factors of every changed layer, up before down, in the order in which torch walks the network.
Whether the layers are those of motion modules, their shapes tell.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ATTENTION = {
    f"attention_blocks.{block}.{layer}": (1, 1) for block in (0, 1) for layer in ("to_q", "to_k", "to_v", "to_out.0")
}
BLOCK = {**ATTENTION, "ff.net.0.proj": (8, 1), "ff.net.2": (1, 4)}
BLOCK = {f"transformer_blocks.0.{name}": sizes for name, sizes in BLOCK.items()}
# Layer of a motion module -> its outputs and inputs, in multiples of the width, for each choice of what is changed.
CHOICES = (
    {"proj_in": (1, 1), **BLOCK, "proj_out": (1, 1)},
    BLOCK,
    {name: sizes for name, sizes in BLOCK.items() if "attention" in name},
)


def named_motion_lora(tensors: Sequence[Tensor]) -> dict[str, Tensor] | None:
    """The list under the names of a MotionLoRA's file; None where its shapes are not those of motion modules."""
    pairs = list(zip(tensors[::2], tensors[1::2], strict=False))
    if not pairs or len(tensors) % 2 or any(t.dim() != 2 for t in tensors):
        return None
    for layers in CHOICES:
        modules = [pairs[i : i + len(layers)] for i in range(0, len(pairs), len(layers))]
        places = _places([module[0][0].shape[0] for module in modules])
        if places and all(_fits(module, list(layers.values())) for module in modules):
            return {
                f"{place}.temporal_transformer.{name}_lora.{part}.weight": factor
                for place, module in zip(places, modules, strict=True)
                for name, pair in zip(layers, module, strict=True)
                for part, factor in zip(("up", "down"), pair, strict=True)
            }
    return None


def _fits(module: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether these are the factors of the layers of one motion module."""
    width = module[0][0].shape[0]
    found = [(up.shape[0], down.shape[1], up.shape[1] - down.shape[0]) for up, down in module]
    return found == [(a * width, b * width, 0) for a, b in sizes]


def _places(widths: Sequence[int]) -> list[str] | None:
    """Where motion modules of these widths are in a UNet: way down, way up, and the middle block last, as torch walks
    the official one.
    """
    for layers in (2, 1):  # ResNets per level; SD 1.x has 2
        levels, middle = divmod(len(widths), 2 * layers + 1)
        if not levels or middle > 1:
            continue
        level_widths = list(widths[: levels * layers : layers])
        down = [w for w in level_widths for _ in range(layers)]
        up = [w for w in reversed(level_widths) for _ in range(layers + 1)]
        if list(widths) == down + up + level_widths[-1:] * middle:
            places = [f"down_blocks.{i}.motion_modules.{j}" for i in range(levels) for j in range(layers)]
            places += [f"up_blocks.{i}.motion_modules.{j}" for i in range(levels) for j in range(layers + 1)]
            return places + ["mid_block.motion_modules.0"] * middle
    return None
