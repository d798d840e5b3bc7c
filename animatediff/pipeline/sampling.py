"""How a clip is sampled: what the user says, what a distilled motion module needs, and defaults for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from animatediff.config.networks import Distillation, ScheduleConfig
from animatediff.config.steering import FreeInit, Steering
from animatediff.diffusion.samplers import OWN_SPACING, find_sampler
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.utils import UserError


@dataclass(frozen=True)
class Sampling:
    """Everything a sampler is told beside the schedule. `timesteps`, where given, stand for spacing and steps."""

    sampler: str = "ddim"
    timestep_spacing: str = "leading"
    steps: int = 25
    guidance_scale: float = 7.5
    eta: float = 0.0
    timesteps: tuple[float, ...] = ()

    def part(self, freeinit: FreeInit | None, iteration: int) -> Sampling:
        """What one iteration of FreeInit is sampled by."""
        return replace(self, steps=freeinit.steps(iteration, self.steps)) if freeinit and freeinit.fast else self

    def check_steering(self, steering: Steering, distilled: Distillation | None) -> None:
        """Raises: UserError for steering that does not go with this sampling."""
        if steering.freeinit and steering.freeinit.fast and (self.timesteps or distilled):
            why = distilled.name if distilled else "timesteps of your own"
            raise UserError(f"freeinit fast: got {why}, whose number of steps is fixed: set fast to false")
        guided = self.guidance_scale > 1
        if steering.guidance_schedule is not None and not guided:
            raise UserError(f"guidance_schedule: got guidance_scale {self.guidance_scale:g}, expected above 1")
        if steering.guidance_rescale and not guided and not steering.pag_scale:
            raise UserError("guidance_rescale: got neither a guidance_scale above 1 nor a pag_scale: remove it")

    def iteration_steps(self, freeinit: FreeInit | None) -> list[int]:
        """The steps of each iteration of FreeInit, or of the only one."""
        return [self.part(freeinit, i).steps for i in range(freeinit.iterations if freeinit else 1)]

    def plan(self, schedule: ScheduleConfig) -> tuple[NoiseSchedule, Tensor]:
        """The noise schedule, spaced as wanted, and the timesteps (steps,) to visit.

        Raises:
            UserError: an unknown spacing, or timesteps or steps that the schedule does not have.
        """
        spaced = NoiseSchedule(replace(schedule, timestep_spacing=self.timestep_spacing))
        chosen = spaced.custom_timesteps(self.timesteps) if self.timesteps else spaced.timesteps(self.steps)
        return spaced, chosen


def complete_sampling(asked: Mapping[str, Any], defaults: Sampling, distilled: Distillation | None = None) -> Sampling:
    """Fill in what is not said.

    Args:
        asked: fields of Sampling; None, "" and () mean: not said.
        defaults: for what neither the user nor the motion module decides.
        distilled: what the motion module needs.

    Raises:
        UserError: an unknown sampler, an eta that the sampler does not have, or something that the distilled motion
            module was not made for.
    """
    said = {key: value for key, value in asked.items() if value is not None and value not in ("", ())}
    if timesteps := said.get("timesteps"):
        if said.get("steps", len(timesteps)) != len(timesteps):
            raise UserError(f"got {said['steps']} steps and {len(timesteps)} timesteps, expected as many: remove steps")
        said["steps"] = len(timesteps)
    if distilled:
        _check_distilled(said, distilled)
        keys = ("sampler", "timestep_spacing", "steps", "guidance_scale")
        defaults = replace(defaults, **{key: getattr(distilled, key) for key in keys})
    elif own := OWN_SPACING.get(said.get("sampler", "")):
        defaults = replace(defaults, timestep_spacing=own)
    chosen = replace(defaults, **said)
    find_sampler(chosen.sampler, eta=chosen.eta)
    return chosen


def _check_distilled(said: Mapping[str, Any], needs: Distillation) -> None:
    def refuse(key: str, expected: object) -> None:
        raise UserError(
            f"{key}: got {said[key]}, expected {expected} with {needs.name}: set {key}={getattr(needs, key)}, "
            "or `version: v2` to sample it as you like"
        )

    for key in ("sampler", "timestep_spacing"):
        if said.get(key, wanted := getattr(needs, key)) != wanted:
            refuse(key, wanted)
    if said.get("steps", needs.steps) not in needs.possible_steps:
        few, many = min(needs.possible_steps), max(needs.possible_steps)
        refuse("steps", f"{few} to {many}" if few < many else few)
    if said.get("guidance_scale", 0) > needs.max_guidance_scale:
        refuse("guidance_scale", f"at most {needs.max_guidance_scale:g}")
