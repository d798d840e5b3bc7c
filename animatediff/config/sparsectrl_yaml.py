"""SparseCtrl as a user says it: which frames are given, how much they count, and the official config of an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from animatediff.config.inference_yaml import MotionKwargs
from animatediff.config.networks import SparseCtrlConfig
from animatediff.config.settings import Bool, Int, Many, build, options, read_yaml
from animatediff.utils import UserError, describe

CONFIGS = {  # kind of encoder -> its official config
    "rgb": "configs/inference/sparsectrl/latent_condition.yaml",
    "scribble": "configs/inference/sparsectrl/image_condition.yaml",
}


@options
class ControlKwargs:
    """`controlnet_additional_kwargs` of an official SparseCtrl config. The weights decide; this has to agree."""

    set_noisy_sample_input_to_zero: Literal[True] = True
    use_simplified_condition_embedding: Bool = True
    conditioning_channels: Int = 4
    concate_conditioning_mask: Literal[True] = True
    use_motion_module: Literal[True] = True
    motion_module_resolutions: Many[Int] = (1, 2, 4, 8)
    motion_module_mid_block: Literal[False] = False
    motion_module_type: Literal["Vanilla"] = "Vanilla"
    motion_module_kwargs: MotionKwargs = MotionKwargs(attention_block_types=("Temporal_Self",))

    @property
    def kind(self) -> str:
        return "rgb" if self.use_simplified_condition_embedding else "scribble"

    def check(self, config: SparseCtrlConfig) -> None:
        """Raises: UserError where the file describes another network than the weights are."""
        motion, kwargs = config.unet.motion, self.motion_module_kwargs
        assert motion is not None
        for key, said, found in (
            ("conditioning_channels", self.conditioning_channels, config.condition_channels),
            ("num_attention_heads", kwargs.num_attention_heads, motion.num_heads),
            ("num_transformer_block", kwargs.num_transformer_block, motion.num_transformer_blocks),
            ("attention_block_types", len(kwargs.attention_block_types), motion.attentions_per_block),
        ):
            if said != found:
                raise UserError(f"got {key} {said}, but the SparseCtrl encoder has {found}: remove controlnet_config")


def load_control_config(path: str | Path, *, kind: str | None) -> ControlKwargs:
    """Read an official SparseCtrl config.

    Args:
        kind: of the encoder that it is for, "rgb" or "scribble".

    Raises:
        UserError: no such file, broken YAML, an unknown or mistyped value, or a config for the other kind.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or set(raw) != {"controlnet_additional_kwargs"}:
        keys = f"keys {', '.join(map(str, raw))}" if isinstance(raw, dict) else describe(raw)
        raise UserError(f"{path}: got {keys}, expected controlnet_additional_kwargs alone")
    where = f"{path}, controlnet_additional_kwargs"
    kwargs = build(ControlKwargs, raw["controlnet_additional_kwargs"], where=where)
    if kwargs.kind != kind:
        raise UserError(
            f"{path} describes a SparseCtrl encoder of kind {kwargs.kind}, but the weights are of kind {kind}: "
            f"use {CONFIGS[kind or 'rgb']}, or remove controlnet_config"
        )
    return kwargs
