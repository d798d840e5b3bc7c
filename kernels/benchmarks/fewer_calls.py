"""Ways to ask the network less often, against simply taking fewer steps at as many calls.

python kernels/benchmarks/fewer_calls.py                    # scores of the bundled model, `results/fewer_calls.csv`
python kernels/benchmarks/fewer_calls.py --time             # what a call costs, by CPU seconds in turns

A call is one prediction for one part of guidance: a guided step takes two. A shallow call is one of DeepCache's
(arXiv 2312.00858): the network's last layer on what the layers below it said at the step before.
`guidance_schedule` says which steps are guided; the step cache is no part of the library: see docs/performance.md.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from memory import networks
from torch import Tensor

from animatediff.config.prompt_yaml import BUNDLED, load_config
from animatediff.diffusion.schedule import step_of
from animatediff.features.feature import Feature, FrameDenoise, Run
from animatediff.lab.run_model import clip_maker
from animatediff.models.unet import UNet, embed_time
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.world.evaluate import evaluate_shapes

RESULTS = Path(__file__).parent / "results/fewer_calls.csv"
SCORES = ("color", "background", "shape", "motion", "smoothness")
COLUMNS = ("way", "steps", "calls", "shallow_calls", "captions", *SCORES)


@dataclass(frozen=True)
class Way:
    """So many steps of ddim, spaced trailing; which of them are guided; every how manieth takes the whole network."""

    steps: int
    guided: Callable[[int], bool] = lambda step: True
    whole: int = 1
    scale: float = 3.0  # of guidance

    @property
    def calls(self) -> tuple[int, int]:
        """Whole and shallow ones."""
        parts = [(step % self.whole == 0, 1 + self.guided(step)) for step in range(self.steps)]
        return sum(n for whole, n in parts if whole), sum(n for whole, n in parts if not whole)

    @property
    def schedule(self) -> dict[str, float]:
        """Of the guidance scale, which is 1 at steps that are not guided."""
        last = self.steps - 1
        return {f"{100 * step / last}%": 1 if self.guided(step) else 1 / self.scale for step in range(self.steps)}


WAYS = {  # all but the first and the last of about 12 calls
    "12 steps": Way(12),
    "6 steps": Way(6),
    "6 steps, guidance 2": Way(6, scale=2.0),
    "guidance in the first half (arXiv 2404.07724)": Way(8, guided=lambda step: step < 4),
    "guidance in the middle half": Way(8, guided=lambda step: 2 <= step < 6),
    "guidance on every second step": Way(8, guided=lambda step: step % 2 == 0),
    "step cache, every second step whole (arXiv 2312.00858)": Way(10, whole=2),
    "4 steps, no guidance": Way(4, guided=lambda step: False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--ways", type=int, nargs="+", help="numbers of WAYS, from 0; by default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.time:
        return print_costs()
    for number, (name, way) in enumerate(WAYS.items()):
        if number in (args.ways or range(len(WAYS))):
            append(args.out, score(name, way, args.captions))


def score(name: str, way: Way, captions: int) -> dict[str, Any]:
    options = {"steps": way.steps, "guidance_scale": way.scale, "guidance_schedule": way.schedule}
    (entry,) = load_config(BUNDLED, options, complete=False).entries
    pipe = AnimateDiffPipeline.from_config(BUNDLED, device="cpu", **options)
    pipe.features = (*pipe.features, step_cache(way.whole))
    found = evaluate_shapes(clip_maker(pipe, entry), captions=captions, batch=10)["generated"]
    calls, shallow = way.calls
    row = {"way": name, "steps": way.steps, "calls": calls, "shallow_calls": shallow, "captions": captions}
    return row | {key: found[key] for key in SCORES}


def append(path: Path, row: dict[str, Any]) -> None:
    print(row, flush=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def step_cache(whole: int) -> Feature:
    """At every `whole`-th step the whole network, at the others its last layer alone."""
    kept: list[Tensor] = []

    @contextmanager
    def cached(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
        if whole == 1:
            yield denoise
            return

        def predict(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
            if step_of(run.timesteps, t) % whole:
                return shallow(run.model.unet, kept[0], x, t, run.text(frames))
            with kept_features(run.model.unet, kept):
                return denoise(x, t, frames, **inputs)

        yield predict

    return cached


@contextmanager
def kept_features(unet: UNet, kept: list[Tensor]) -> Iterator[None]:
    """Within it a call of the network leaves what its last layer is given from below in `kept`."""

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        kept[:] = [args[0][:, : -unet.config.block_out_channels[0]]]

    with ExitStack() as stack:
        stack.callback(unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep).remove)
        yield


def shallow(unet: UNet, below: Tensor, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The network's prediction with what its last layer is given from below taken from another call."""
    (b, frames), last = x.shape[:2], unet.up_blocks[-1]
    h = unet.conv_in(rearrange(x, "b f c h w -> (b f) c h w"))
    time = embed_time(unet, t, None, None, x.dtype)
    h = last.layer(len(last.resnets) - 1, torch.cat([below, h], dim=1), time, context, frames)
    return rearrange(unet.conv_out(unet.conv_norm_out(h, frames, silu=True)), "(b f) c h w -> b f c h w", b=b)


def print_costs() -> None:
    """Of half of Stable Diffusion's widths with random weights at 16 frames of 128x128, and of the bundled network."""
    print_costs_of("half of SD 1.5", UNet(networks().unet).eval(), 16)
    print_costs_of("bundled", AnimateDiffPipeline.from_config(BUNDLED, device="cpu").unet, 8)


@torch.no_grad()
def print_costs_of(name: str, unet: UNet, side: int) -> None:
    x, text, t = torch.randn(2, 16, 4, side, side), torch.randn(2, 77, unet.config.context_dim), torch.full((2,), 500)
    kept: list[Tensor] = []
    with kept_features(unet, kept):
        unet(x, t, text)
    ways = {
        "guided": lambda: unet(x, t, text),
        "conditional alone": lambda: unet(x[:1], t[:1], text[:1]),
        "guided, shallow": lambda: shallow(unet, kept[0], x, t, text),
    }
    seconds: dict[str, float] = {}
    for _ in range(3):
        for way, run in ways.items():
            start = time.process_time()
            run()
            seconds[way] = min(time.process_time() - start, seconds.get(way, float("inf")))
    print(name, {way: f"{least:.3g} s, {least / seconds['guided']:.3f}" for way, least in seconds.items()})


if __name__ == "__main__":
    main()
