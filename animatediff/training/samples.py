"""Sample clips during training: the same prompts and seeds every time, as the weights are by then."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from animatediff.config.clip_formats import check_fps
from animatediff.config.condition_options import ControlNet
from animatediff.config.refusals import condition_frames
from animatediff.config.request import MAX_FRAMES, MAX_SIDE, Request, Size, SparseCtrl
from animatediff.config.settings import Float, Int, Many, opt, options
from animatediff.features.controlnet import read_hints
from animatediff.features.guide_pictures import read_pictures
from animatediff.features.noise import seeded
from animatediff.features.sparsectrl import condition_pixels
from animatediff.media.video import save_video
from animatediff.pipeline.model import Model
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.training.losses import MAX_FACTOR
from animatediff.training.sources import resolve_path
from animatediff.utils import UserError, naming


@options
class SampleConfig:
    """What to draw, and how often."""

    every: Int = opt(..., "steps", ge=1)
    prompt: Many[str] = opt(..., "one or several", min_length=1)
    n_prompt: str = opt("", "negative prompt", "negative_prompt")
    seed: Int = opt(0, "of the first prompt; the next has seed + 1", ge=0, le=2**63)
    steps: Int | None = opt(None, "of sampling; by default 25, or those of the few that are trained for",
                            "num_inference_steps", ge=1)  # fmt: skip
    guidance_scale: Float | None = opt(None, "of classifier-free guidance; by default 7.5, or 1 for few steps", ge=0,
                                       le=MAX_FACTOR)  # fmt: skip
    L: Int = opt(16, "frames; 1 where no motion module takes part", "num_frames", ge=1, le=MAX_FRAMES)
    H: Int = opt(256, "pixels", "height", ge=8, le=MAX_SIDE, multiple_of=8)
    W: Int = opt(256, "pixels", "width", ge=8, le=MAX_SIDE, multiple_of=8)
    fps: Float = opt(8.0, "of the GIFs")
    controlnet_images: Many[str] = opt((), "for a SparseCtrl encoder or a ControlNet that is being trained,")
    controlnet_image_indexs: Many[Int] = opt((0,), "the frame of each, of SparseCtrl")
    ip_adapter_images: Many[str] = opt((), "for an IP-Adapter that is being trained")

    def __post_init__(self) -> None:
        check_fps(self.fps, "gif")


class SampleClips:
    """Draws the prompts with networks that are being trained, and no randomness but its own.

    Raises:
        UserError: the networks make no clips of that size or length, or take no such images.
    """

    def __init__(self, config: SampleConfig, components: Model, log: Callable[[str], None]):
        self.config, self.log, self.every = config, log, config.every
        self.pipeline = AnimateDiffPipeline(components, Request(size=Size(height=config.H, width=config.W)))
        downsampling, motion = components.vae.config.downsampling, components.unet.config.motion
        if side := next((s for s in (config.H, config.W) if s % downsampling), None):
            raise UserError(
                f"samples: got a side of {side} pixels, expected multiples of {downsampling}: change H or W"
            )
        if motion and config.L > motion.max_frames:
            raise UserError(f"samples: L: got {config.L}, expected at most {motion.max_frames}, what the module holds")
        few = components.distillation
        self.steps = config.steps or (few.steps if few else 25)
        self.pictures = self._pictures(components.networks)
        with naming("samples"):  # steps or a scale that a network of few steps cannot do
            self.pipeline.request_for(
                {"prompt": "", "num_inference_steps": self.steps, "guidance_scale": config.guidance_scale}
            )

    def _pictures(self, networks: Collection[str]) -> dict[str, Any]:
        """Options of the call that give the network in training its pictures."""
        c = self.config
        for option, groups, what in (
            ("controlnet_images", ("sparsectrl", "controlnets"), "a SparseCtrl encoder or a ControlNet"),
            ("ip_adapter_images", ("ip_adapters",), "an IP-Adapter"),
        ):
            if bool(getattr(c, option)) != any(group in networks for group in groups):
                raise UserError(f"samples: expected {option} where {what} is trained, and only there")
        images = tuple(resolve_path(path) for path in (*c.controlnet_images, *c.ip_adapter_images))
        entry = {"path": "in training", "images": images}
        with naming("samples"):
            if "sparsectrl" in networks:
                condition_frames(c.controlnet_image_indexs, images=len(images), frames=c.L)
                condition_pixels(SparseCtrl(images=images), (c.H, c.W))
                return {"conditioning_frames": images, "controlnet_frame_indices": c.controlnet_image_indexs}
            if "controlnets" in networks:
                read_hints(ControlNet(**entry), Request(size=Size(num_frames=c.L, height=c.H, width=c.W)))
                return {"controlnet": entry}
            if "ip_adapters" in networks:
                read_pictures(images)
                return {"ip_adapter": entry, "image_encoder": "in training"}
        return {}

    def __call__(self, folder: Path, step: int) -> None:
        """Write `folder`/<step>-<number>.gif, or a PNG folder of that name for a single frame."""
        config = self.config
        for number, prompt in enumerate(config.prompt):
            with torch.no_grad():
                clip = self.pipeline(
                    prompt,
                    num_frames=config.L,
                    num_inference_steps=self.steps,
                    guidance_scale=config.guidance_scale,
                    negative_prompt=config.n_prompt,
                    generator=seeded(config.seed + number),
                    output_type="pt",
                    **self.pictures,
                ).frames[0]
            name = f"{step:06d}-{number}" + (".gif" if config.L > 1 else "")
            settings = {"prompt": prompt, "seed": config.seed + number, "training_step": step}
            save_video(clip, folder / name, fps=config.fps, metadata=settings)
        self.log(f"drew {len(config.prompt)} samples of step {step} into {folder}")
