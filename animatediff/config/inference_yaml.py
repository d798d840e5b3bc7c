"""Official inference configs: what a motion module's network and its noise schedule are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from animatediff.config.networks import RECIPES, SD1_RECIPE, MotionConfig, ScheduleConfig
from animatediff.config.settings import Bool, Int, Many, build, options, read_yaml
from animatediff.utils import UserError, describe, unknown_key

OF_IMAGES = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")  # what an image model's file may say


@options
class MotionKwargs:
    """`motion_module_kwargs` of an official inference config."""

    num_attention_heads: Int = 8
    num_transformer_block: Int = 1
    attention_block_types: Many[Literal["Temporal_Self"]] = ("Temporal_Self", "Temporal_Self")
    cross_frame_attention_mode: str | None = None
    temporal_position_encoding: Bool = True
    temporal_position_encoding_max_len: Int | None = None
    temporal_attention_dim_div: Int = 1
    zero_initialize: Bool = True


@options
class UNetKwargs:
    """`unet_additional_kwargs` of an official inference config."""

    use_inflated_groupnorm: Bool = False  # False: ResNet GroupNorms pool over the frames (v1)
    use_motion_module: Bool = True
    motion_module_resolutions: Many[Int] = (1, 2, 4, 8)
    motion_module_mid_block: Bool = False
    motion_module_decoder_only: Literal[False] = False
    motion_module_type: Literal["Vanilla"] = "Vanilla"
    motion_module_kwargs: MotionKwargs = MotionKwargs()
    unet_use_cross_frame_attention: Literal[False] = False
    unet_use_temporal_attention: Literal[False] = False


@dataclass(frozen=True)
class InferenceConfig:
    """What an official inference config says: the motion module's build, and changes to the noise schedule."""

    path: str = ""
    unet: UNetKwargs | None = None  # None: the file says nothing, so the weights decide alone
    schedule: dict[str, Any] = field(default_factory=dict)  # ScheduleConfig fields by name

    @property
    def version(self) -> str:
        """The released version with this build, v1, v2 or v3."""
        if self.unet is None:
            return ""
        if self.unet.motion_module_mid_block:
            return "v2"
        return "v3" if self.unet.use_inflated_groupnorm else "v1"

    def build_schedule(
        self, image: ScheduleConfig | None = None, *, betas: ScheduleConfig = SD1_RECIPE.schedule
    ) -> ScheduleConfig:
        """The noise schedule.

        Args:
            image: what the image model's file says of its prediction and spacing, used where this file does not.
            betas: what the networks' family was trained with, the same.
        """
        stated = {name: getattr(image or betas, name) for name in OF_IMAGES}
        return replace(betas, **stated | self.schedule)

    def check(self, motion: MotionConfig) -> None:
        """Compare with a motion module.

        Raises:
            UserError: the file describes another network than the weights are.
        """
        if self.unet is None:
            return
        kwargs = self.unet.motion_module_kwargs
        self.check_version(motion)
        self._compare("use_motion_module", self.unet.use_motion_module, True, motion)
        levels = [r for r in self.unet.motion_module_resolutions if r <= max(motion.resolutions)]
        self._compare("motion_module_resolutions", sorted(levels), sorted(motion.resolutions), motion)
        self._compare("num_attention_heads", kwargs.num_attention_heads, motion.num_heads, motion)
        self._compare("num_transformer_block", kwargs.num_transformer_block, motion.num_transformer_blocks, motion)
        self._compare("attention_block_types", len(kwargs.attention_block_types), motion.attentions_per_block, motion)
        self._compare("temporal_position_encoding", kwargs.temporal_position_encoding, motion.tells_positions, motion)
        self._compare("temporal_attention_dim_div", kwargs.temporal_attention_dim_div, 1, motion)

    def check_version(self, motion: MotionConfig) -> None:
        """Compare only what tells the versions apart; raises as `check` does."""
        if self.unet is None:
            return
        self._compare("motion_module_mid_block", self.unet.motion_module_mid_block, motion.mid_block, motion)
        if motion.version in RECIPES:  # the SDXL branch's own file does not know the word
            return
        per_frame = not motion.resnet_norm_over_frames
        self._compare("use_inflated_groupnorm", self.unet.use_inflated_groupnorm, per_frame, motion)

    def _compare(self, key: str, said: Any, found: Any, motion: MotionConfig) -> None:
        if said != found:
            fitting = "v2" if motion.mid_block else "v1" if motion.resnet_norm_over_frames else "v3"
            raise UserError(
                f"{self.path} describes a {self.version} module with {key} {_plain(said)}, but the motion module is "
                f"{motion.version} with {_plain(found)}: use configs/inference/inference-{fitting}.yaml, or remove "
                "inference_config"
            )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def load_inference_config(path: str | Path) -> InferenceConfig:
    """Read an official inference config (`unet_additional_kwargs`, `noise_scheduler_kwargs`).

    Raises:
        UserError: no such file, broken YAML, or an unknown or mistyped value.
    """
    raw = read_yaml(path)
    known = ["unet_additional_kwargs", "noise_scheduler_kwargs"]
    if not isinstance(raw, dict):
        raise UserError(f"{path}: got {describe(raw)}, expected {' and '.join(known)}")
    if unknown := sorted(set(raw) - set(known)):
        raise UserError(f"{path}: {unknown_key(unknown[0], known)}")
    unet = raw.get("unet_additional_kwargs")
    schedule = raw.get("noise_scheduler_kwargs") or {}
    built = build(ScheduleConfig, schedule, where=f"{path}, noise_scheduler_kwargs")
    return InferenceConfig(
        path=str(path),
        unet=None if unet is None else build(UNetKwargs, unet, where=f"{path}, unet_additional_kwargs"),
        schedule={key: getattr(built, key) for key in schedule},
    )
