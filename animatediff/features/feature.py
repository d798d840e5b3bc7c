"""One run of a sampler, and what a feature is: something that gives a denoiser of frames from another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from animatediff.config.request import Request
from animatediff.diffusion.schedule import NoiseSchedule, step_of


class FrameDenoise(Protocol):
    """Predicts w frames of all parts of the batch."""

    def __call__(self, x: Tensor, t: Tensor, frames: Tensor, **network_inputs: Any) -> Tensor:
        """A prediction of x's shape and type.

        Args:
            x: latents (n b, w, c, h, w), n being the parts of the batch.
            t: timesteps (n b,).
            frames: numbers (w,) of these frames in the clip, in the order in which the network sees them.
            network_inputs: further arguments of `UNet.forward`.
        """
        ...


Spread = Callable[[Sequence[Callable[[], Tensor]], Tensor], Iterable[Tensor]]


def in_turn(tasks: Sequence[Callable[[], Tensor]], like: Tensor) -> Iterable[Tensor]:
    """What the tasks of a step make, each of the shape and type of `like`, in their order: here one after the other."""
    return (task() for task in tasks)


@dataclass(frozen=True)
class Run:
    """What every feature of one run of a sampler may ask for.

    Attributes:
        model: the networks (`pipeline.model.Model`).
        request: what is asked for, nothing left open.
        timesteps: (steps,), those that the sampler visits.
        text: frame numbers (w,) -> the text embedding of all parts, (n b, l, d), or (n b, w, l, d) where it travels.
        parts: of the batch, in this order: some of "unconditional", "conditional", "perturbed".
        first_frame: the number of the first frame in its clip, where only a part of the clip is sampled.
        cache: lasts as long as the clip, which may take several runs.
        spread: computes what a step is made of, windows or parts of the batch, here or shared with other processes.
        added: frame numbers (w,) -> what the network is told beside the text: SDXL's `pooled` and `time_ids`.
    """

    model: Any
    request: Request
    schedule: NoiseSchedule
    timesteps: Tensor
    text: Callable[[Tensor], Tensor]
    parts: tuple[str, ...] = ("conditional",)
    first_frame: int = 0
    cache: dict[str, Any] = field(default_factory=dict)
    added: Callable[[Tensor], dict[str, Tensor]] = lambda frames: {}
    spread: Spread = in_turn

    def progress(self, t: Tensor) -> float:
        """Where in the sampling t (b,) is: 0 at the first step, 1 at the last."""
        return step_of(self.timesteps, t) / max(len(self.timesteps) - 1, 1)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for the clip."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


# What is switched off gives back the denoiser that it got, and costs nothing.
Feature = Callable[[FrameDenoise, Run], AbstractContextManager[FrameDenoise]]
