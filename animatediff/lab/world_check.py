"""Checks an image model of Shapes, the toy data set, before a motion module is trained on it.

`python -m animatediff.lab.world_check IMAGE_MODEL`

A motion module moves what the frozen image model draws, so the direction of a motion has to be in single frames, and
in the network's features at high noise, where the motion is decided. Both are measured here.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence

import torch
from torch import Tensor

from animatediff.checkpoints.load import ImageModel, load_base
from animatediff.config.networks import ScheduleConfig
from animatediff.diffusion.guidance import classifier_free_guidance
from animatediff.diffusion.samplers import Steps, ddim
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.models.tokenizer import Tokenizer
from animatediff.training.latents import encode
from animatediff.utils import run_main
from animatediff.world.read_hint import read_hint
from animatediff.world.series import World
from animatediff.world.shapes import MOTIONS, SIZE, SPINS

HELD_OUT_SEED = 1  # of the scenes; training draws from seed 0
PROBED_TIMESTEP = 960  # where 25 steps of DDIM begin


@torch.no_grad()
def hint_accuracy(
    model: ImageModel,
    *,
    captions: int = 100,
    motions: Sequence[str] = tuple(MOTIONS),
    steps: int = 25,
    guidance_scale: float = 3.0,
) -> dict[str, float]:
    """Percent of single frames, made from held-out captions, that hint at the motion that was asked for.

    Returns:
        For each of `motions`, and `all`.
    """
    world = World(captions, motions=tuple(motions), seed=HELD_OUT_SEED)
    scenes = [world.scene(i) for i in range(captions)]
    frames = draw_frames(model, [scene.caption for scene in scenes], steps=steps, guidance_scale=guidance_scale)
    right = [read_hint(frame) == scene.motion for frame, scene in zip(frames, scenes, strict=True)]
    found = {"all": right} | {
        motion: [r for r, s in zip(right, scenes, strict=True) if s.motion == motion] for motion in motions
    }
    return {name: round(100 * sum(values) / len(values), 1) for name, values in found.items()}


@torch.no_grad()
def draw_frames(model: ImageModel, captions: Sequence[str], *, steps: int, guidance_scale: float) -> Tensor:
    """Frames (n, 3, 64, 64), range [-1, 1], by DDIM; that of caption i from noise of seed i."""
    assert model.vae is not None
    schedule = NoiseSchedule(model.schedule or ScheduleConfig())
    context = model.text_encoder(torch.cat([Tokenizer()([""] * len(captions)), Tokenizer()(list(captions))])[:, 0])
    side = SIZE // model.vae.config.downsampling
    shape = (1, model.vae.config.latent_channels, side, side)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(len(captions))])
    denoise = classifier_free_guidance(lambda x, t: model.unet(x, t, context), guidance_scale)
    latents = ddim(noise, Steps(denoise, schedule, schedule.timesteps(steps)))
    return model.vae.decode(latents[:, 0] / model.vae.config.scaling_factor).clamp(-1, 1)


@torch.no_grad()
def direction_in_features(model: ImageModel, *, clips: int = 64, frames: int = 8, captioned: bool = True) -> float:
    """Percent of held-out noisy spins whose direction a linear probe reads from the features of the network's middle.

    The features, averaged over the frames, are those of clips noised to `PROBED_TIMESTEP`. The probe is the difference
    of the two directions' means over as many clips of the training series.

    Args:
        captioned: tell the network the caption; otherwise it has to see the direction.
    """
    (probe, probe_way), (held_out, way) = (
        _features(model, World(clips, motions=SPINS, seed=seed), frames, captioned) for seed in (0, HELD_OUT_SEED)
    )
    difference = probe[probe_way > 0].mean(dim=0) - probe[probe_way < 0].mean(dim=0)
    middle = (probe[probe_way > 0].mean(dim=0) + probe[probe_way < 0].mean(dim=0)) / 2
    return 100 * float((((held_out - middle) @ difference).sign() == way).float().mean())


def _features(model: ImageModel, world: World, frames: int, captioned: bool) -> tuple[Tensor, Tensor]:
    """Features (n, d) and directions (n,): 1 clockwise, -1 counter-clockwise."""
    assert model.vae is not None
    videos, captions = world.render(range(world.clips))
    latents = encode(model.vae, videos[:, :: videos.shape[1] // frames], chunk_frames=64)
    schedule = NoiseSchedule(model.schedule or ScheduleConfig())
    t = torch.full((len(latents),), PROBED_TIMESTEP)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(world.seed))
    context = model.text_encoder(Tokenizer()(captions if captioned else [""] * len(captions))[:, 0])
    kept: list[Tensor] = []
    middle = model.unet.mid_block.attentions[0]  # the motion module of the middle reads what this gives
    hook = middle.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model.unet(schedule.add_noise(latents, noise, t), t, context)
    hook.remove()
    features = kept[0].unflatten(0, latents.shape[:2]).mean(dim=1).flatten(1)
    return features, torch.tensor([1.0 if world.scene(i).motion == SPINS[0] else -1.0 for i in range(world.clips)])


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="an image model of Shapes")
    parser.add_argument("--captions", type=int, default=100, help="single frames to draw (100)")
    parser.add_argument("--motions", nargs="+", default=list(MOTIONS), help="that the captions ask for in turn")
    args = parser.parse_args()
    model = load_base(args.model)
    found = {
        "hints": hint_accuracy(model, captions=args.captions, motions=args.motions),
        "direction in features": direction_in_features(model),
        "direction in features, no caption": direction_in_features(model, captioned=False),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    run_main(main)
