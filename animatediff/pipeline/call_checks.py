"""Numbers of a call that no network could work with."""

from __future__ import annotations

from animatediff.features.windows import Windows
from animatediff.pipeline.model import Components
from animatediff.pipeline.outputs import OUTPUT_TYPES
from animatediff.pipeline.sampling import Sampling
from animatediff.utils import UserError


def check_call(
    c: Components,
    sampling: Sampling,
    *,
    num_frames: int,
    height: int,
    width: int,
    num_videos_per_prompt: int,
    windows: Windows | None,
    stretch: float,
    output_type: str,
) -> None:
    """Raises UserError for an argument of `AnimateDiffPipeline.__call__` that is out of range.

    Args:
        num_frames: that are sampled together, in windows or without.
        stretch: of the positional encoding.
        The others are those of the call.
    """
    for name, value in (
        ("num_frames", num_frames),
        ("height", height),
        ("width", width),
        ("num_inference_steps", sampling.steps),
        ("num_videos_per_prompt", num_videos_per_prompt),
    ):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected at least 1")
    for name, value in (("height", height), ("width", width)):
        if value % c.vae.config.downsampling:
            raise UserError(f"{name}: got {value} pixels, expected a multiple of {c.vae.config.downsampling}")
    motion, seen = c.unet.config.motion, min(num_frames, windows.length) if windows else num_frames
    if motion and seen > (longest := int(motion.max_frames * stretch)):
        what = "window length" if windows else "num_frames"
        raise UserError(
            f"{what}: got {seen}, expected at most {longest}, the longest clip the {motion.version} motion module "
            f"was trained on: animate in overlapping windows by windows=Windows(length={min(16, longest)}), make a "
            "shorter clip, or set max_frames in the config"
        )
    if motion and stretch != 1 and not motion.tells_positions:
        raise UserError(f"pe_stretch: got {stretch:g}, expected 1: the motion module has no positional encoding")
    if sampling.steps > (most := c.schedule.num_train_timesteps):
        raise UserError(f"num_inference_steps: got {sampling.steps}, expected at most {most}")
    if sampling.guidance_scale < 0:
        raise UserError(f"guidance_scale: got {sampling.guidance_scale:g}, expected 0 or more (1 is no guidance)")
    if not 0 <= sampling.eta <= 1:
        raise UserError(f"eta: got {sampling.eta:g}, expected 0 (deterministic) to 1")
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"got output_type {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
