"""Text2Video-Zero: clips of an image model that was never trained on any, to measure motion modules against."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff.diffusion.samplers import Steps, ddim
from animatediff.features.noise import draw_noise, seeded
from animatediff.lab.cross_frame import cross_frame_attention
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.prompts import encode_prompts
from animatediff.pipeline.resolve import plan_steps
from animatediff.pipeline.sample import guided_denoiser, make_run
from animatediff.utils import UserError

MOTION = 12 / 512  # of the picture's sides per frame: the paper's 12 pixels of 512 (lambda = 12, delta = 1)
LEVELS = (941, 881)  # T and T': where the authors' code is after 2 and after 5 of 50 steps


@torch.no_grad()
def text2video_zero(
    pipeline: AnimateDiffPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    frames: int = 16,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    motion: tuple[float, float] = (MOTION, MOTION),
    levels: tuple[float, float] = LEVELS,
) -> Tensor:
    """Animate prompts without a motion module (arXiv 2303.13439; without its background smoothing).

    The first frame is denoised down to T'. What is there is moved, further for every frame, and noised up to T again,
    with noise of each frame's own. From T all frames are sampled by DDIM, looking at the first one.

    Args:
        pipeline: an image model, of any style, without a motion module; clips get its `default_size`.
        prompts: n texts.
        seeds: of each clip's noise. The first frame is what the image model makes alone of a seed's first noise.
        frames: f.
        steps: of DDIM, as the pipeline's call has them; T is visited besides, where it is not one of them.
        guidance_scale, negative_prompt: as the pipeline's call has them.
        motion: how far everything moves per frame, to the right and down, in parts of the picture's width and height.
            Latents move in whole cells (mixing cells would weaken their noise) and are mirrored at the edges.
        levels: T and T', timesteps within 0 … 999. The further apart, the freer the frames are of each other.

    Returns:
        Clips (n, f, 3, H, W) in [-1, 1] on the CPU.

    Raises:
        UserError: the pipeline has a motion module, there are more or fewer seeds than prompts, or a value is out of
            range.
    """
    c, (height, width) = pipeline.model, pipeline.default_size
    if c.unet.config.motion is not None:
        raise UserError("text2video_zero: got a motion module, expected an image model: load it with motion_module=''")
    if len(seeds) != len(prompts):
        raise UserError(f"got {len(seeds)} seeds for {len(prompts)} prompts, expected one for each")
    options = {"num_frames": frames, "sampler": "ddim", "steps": steps, "guidance_scale": guidance_scale}
    request = pipeline.request_for({"prompt": list(prompts), "negative_prompt": negative_prompt, **options})
    schedule, timesteps = plan_steps(request.sampling, c.schedule)
    high, low = schedule.custom_timesteps(levels)
    context, negative = encode_prompts(c, request)
    contexts = {"conditional": context} if negative is None else {"unconditional": negative, "conditional": context}
    run = make_run(c, request, contexts, schedule, timesteps)
    generators = [seeded(seed) for seed in seeds]
    cells = (height // c.vae.config.downsampling, width // c.vae.config.downsampling)

    def draw(frames: int) -> Tensor:
        return draw_noise(generators, (c.unet.config.in_channels, frames, *cells)).to(c.device)

    def sample(x: Tensor, visited: Tensor, end: Tensor | None = None) -> Tensor:
        """To the level `end`, by default to clean latents."""
        part = copy.copy(schedule)
        if end is not None:
            part.final_alpha_cumprod = schedule.alpha_at(end)
        return ddim(x, Steps(denoise, part, visited)) if len(visited) else x

    from_high = torch.cat([high[None], timesteps[timesteps < high]])
    with cross_frame_attention(c.unet), guided_denoiser(run) as denoise:
        first = sample(draw(1), timesteps[timesteps > high], high)
        calm = sample(first, from_high[from_high > low], low)
        moved = torch.cat([calm[:, :0], *(move(calm, k * motion[0], k * motion[1]) for k in range(1, frames))], dim=1)
        kept = schedule.alpha_at(high) / schedule.alpha_at(low)  # DDPM from T' to T
        others = kept.sqrt() * moved + (1 - kept).sqrt() * draw(frames - 1)
        x = sample(torch.cat([first, others], dim=1), from_high)
    return c.vae.decode_video(x).float().cpu()


def move(x: Tensor, right: float, down: float) -> Tensor:
    """Pictures (…, h, w) moved by parts of their sides, in whole cells, and mirrored at the edges."""
    rows, columns = (
        _mirrored(torch.arange(side) - round(part * side), side)
        for side, part in zip(x.shape[-2:], (down, right), strict=True)
    )
    return x[..., rows[:, None], columns]


def _mirrored(index: Tensor, side: int) -> Tensor:
    index = index % (2 * side)
    return torch.minimum(index, 2 * side - 1 - index)
