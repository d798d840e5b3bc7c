"""Scales of LoRAs that change while a clip is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from animatediff.config.keyframes import Keyframes
from animatediff.features.feature import FrameDenoise, Run
from animatediff.models.lora import LoRAStack


@contextmanager
def lora_schedule(denoise: FrameDenoise, run: Run) -> Iterator[FrameDenoise]:
    """`loras.schedule` and `loras.motion_schedule`: factors of the scales, by step.

    The LoRAs of the UNet alone follow them: the text is encoded once, before sampling.
    """
    options, stack = run.request.loras, run.model.loras
    schedules = {"loras": options.schedule, "motion_loras": options.motion_schedule}
    found = {name: Keyframes.read(schedules[role]) for name, role in run.model.lora_roles.items()
             if schedules.get(role) is not None}  # fmt: skip
    if not found:
        yield denoise
        return
    scales = {name: stack.scale(name) for name in found}

    def scheduled(x: Tensor, t: Tensor, frames: Tensor, **inputs: Any) -> Tensor:
        for name, keyframes in found.items():
            stack.set_scale(name, scales[name] * keyframes.at(0, run.progress(t)))
        return denoise(x, t, frames, **inputs)

    with stack.unmerged():
        try:
            yield scheduled
        finally:
            for name, scale in scales.items():
                stack.set_scale(name, scale)


@contextmanager
def loras_scaled(stack: LoRAStack, factor: float) -> Iterator[None]:
    """Multiply the scales of all LoRAs for a while, as diffusers' `cross_attention_kwargs={"scale": …}` does."""
    if factor == 1:
        yield
        return
    scales = {name: stack.scale(name) for name in stack.names}
    try:
        for name, scale in scales.items():
            stack.set_scale(name, scale * factor)
        yield
    finally:
        for name, scale in scales.items():
            stack.set_scale(name, scale)
