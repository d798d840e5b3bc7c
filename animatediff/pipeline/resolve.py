"""The one place for what a request leaves to its files: defaults that depend on them, and what they cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace

from torch import Tensor

from animatediff.config.memory_options import Memory
from animatediff.config.networks import SD1_RECIPE, Distillation, Recipe, ScheduleConfig, usual_size
from animatediff.config.request import Inputs, MicroConditioning, Request, Sampling, Windows
from animatediff.config.spellings import called
from animatediff.diffusion.samplers import OWN_SPACING, find_sampler
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.extend import chain_window
from animatediff.features.inputs import default_strength
from animatediff.features.windows import DEFAULT_LENGTH
from animatediff.pipeline.model import Model
from animatediff.utils import UserError

PICTURE_GROUPS = {"pia": "pia", "animatelcm-i2v": "i2v"}  # kind of motion module -> group of its picture
PICTURE_MODULES = {"pia": "PIA's file", "i2v": "AnimateLCM-I2V's file"}
STEPS = 25  # where neither the request, nor a distilled model, nor the family says
DETERMINISTIC = ("ddim", "euler", "dpmpp_2m", "pndm")


@dataclass(frozen=True)
class Facts:
    """What files, by their headers, or loaded networks say.

    Attributes:
        schedule: the noise schedule.
        spacing: the `timestep_spacing` that an inference config asks for.
        distillation: what the motion module or image model needs, if it was distilled to few steps.
        motion: how messages call the motion module; "" without one.
        max_frames: the longest clip it takes; None without one.
        tells_positions: whether it has a positional encoding.
        loaded: how many networks each group of the request has; None where they are yet to be loaded.
        picture: the group that its picture belongs to, of motion modules that animate one: "pia", "i2v", else "".
        sparsectrl: how messages call the SparseCtrl encoder.
        sparsectrl_frames: the longest clip it takes; None without one.
        downsampling: pixels of a side for each latent pixel.
        recipe: how models of this family are sampled.
        sdxl, refiner: whether the image model is SDXL, or its refiner.
        memory: how the networks were loaded; None where they are yet to be.
    """

    schedule: ScheduleConfig
    distillation: Distillation | None = None
    spacing: str | None = None
    motion: str = ""
    max_frames: int | None = None
    tells_positions: bool = True
    loaded: Mapping[str, int] | None = None
    picture: str = ""
    sparsectrl: str = ""
    sparsectrl_frames: int | None = None
    downsampling: int = 8
    recipe: Recipe = SD1_RECIPE
    sdxl: bool = False
    refiner: bool = False
    memory: Memory | None = None


def facts_of(model: Model) -> Facts:
    """What loaded networks say."""
    motion, encoder, spacing = model.unet.config.motion, model.sparsectrl, model.schedule.timestep_spacing
    control = encoder.config.unet.motion if encoder else None  # type: ignore[union-attr]
    return Facts(
        model.schedule,
        model.distillation,
        spacing=None if spacing == ScheduleConfig.timestep_spacing else spacing,
        motion=f"the {motion.version} motion module" if motion else "",
        max_frames=motion.max_frames if motion else None,
        tells_positions=motion.tells_positions if motion else True,
        loaded={group: len(n) if isinstance(n, Sized) else 1 for group, n in model.networks.items()},
        picture=next((group for group in PICTURE_GROUPS.values() if group in model.networks), ""),
        sparsectrl="the SparseCtrl encoder",
        sparsectrl_frames=control.max_frames if control else None,
        downsampling=model.vae.config.downsampling,
        recipe=model.recipe,
        sdxl=bool(model.unet.config.added_channels),
        refiner=model.text_encoder is None,
        memory=model.memory,
    )


def resolve(request: Request, facts: Facts, *, steps: int = STEPS, complete: bool = True) -> Request:
    """The same request with nothing left open.

    Args:
        steps: where neither the request, nor a distilled model, nor the family says how many.
        complete: as of `refusals`.

    Raises:
        UserError: something that the files cannot do.
    """
    sides = zip(("height", "width"), usual_size(facts.recipe, facts.distillation), strict=True)
    chosen = {name: getattr(request.size, name) or default for name, default in sides}
    request = replace(request, size=replace(request.size, **chosen))
    for name in ("height", "width"):
        if (side := getattr(request.size, name)) % facts.downsampling:
            typed = called(request, f"size.{name}")
            raise UserError(f"{typed}: got {side} pixels, expected multiples of {facts.downsampling}")
    sampling = _sampling(request, facts, steps)
    _check_guidance(request, sampling, facts)
    inputs = _inputs(request, sampling, facts)
    windows = _windows(request, facts)
    _check_sparsectrl(request, windows, facts)
    _check_picture(request, facts, complete)
    _check_loaded(request, facts)
    _check_micro_conditioning(request, facts)
    _check_memory(request, facts)
    return replace(request, sampling=sampling, inputs=inputs, windows=windows)


def plan_steps(sampling: Sampling, schedule: ScheduleConfig, steps: int | None = None) -> tuple[NoiseSchedule, Tensor]:
    """The noise schedule, spaced as wanted, and the timesteps (steps,) to visit.

    Raises:
        UserError: timesteps or steps that the schedule does not have.
    """
    spaced = NoiseSchedule(replace(schedule, timestep_spacing=sampling.timestep_spacing))
    if sampling.timesteps:
        return spaced, spaced.custom_timesteps(sampling.timesteps)
    return spaced, spaced.timesteps(steps or sampling.steps)


def _sampling(request: Request, facts: Facts, steps: int) -> Sampling:
    """What the user asks for, then what a distilled motion module needs, then the defaults."""
    s, distilled, recipe = request.sampling, facts.distillation, facts.recipe
    if distilled and not s.timesteps and (s.steps or distilled.steps) == len(distilled.timesteps):
        s = replace(s, timesteps=distilled.timesteps)
    defaults = {"steps": recipe.steps or steps, "guidance_scale": recipe.guidance_scale, "sampler": recipe.sampler}
    defaults["timestep_spacing"] = facts.schedule.timestep_spacing
    if s.timesteps:
        if s.steps not in (None, len(s.timesteps)):
            raise UserError(f"got {s.steps} steps and {len(s.timesteps)} timesteps, expected as many: remove steps")
        defaults["steps"] = len(s.timesteps)
    if distilled:
        _check_distilled(request, distilled)
        keys = ("sampler", "timestep_spacing", "guidance_scale") + (() if s.timesteps else ("steps",))
        defaults |= {key: getattr(distilled, key) for key in keys}
    elif facts.spacing is None and (own := OWN_SPACING.get(s.sampler)):
        defaults["timestep_spacing"] = own
    chosen = {key: value for key in defaults if (value := getattr(s, key)) not in (None, "")}
    full = replace(s, **defaults | chosen)
    find_sampler(full.sampler, eta=full.eta)
    if full.steps > (most := facts.schedule.num_train_timesteps):
        raise UserError(f"{called(request, 'sampling.steps')}: got {full.steps}, expected at most {most}")
    plan_steps(full, facts.schedule)
    return full


def _check_micro_conditioning(request: Request, facts: Facts) -> None:
    options, defaults = request.micro_conditioning, MicroConditioning()
    for name in vars(options):
        score, target = name.endswith("aesthetic_score"), name == "target_size"
        understood = facts.refiner if score else facts.sdxl and not (target and facts.refiner)
        if getattr(options, name) != getattr(defaults, name) and not understood:
            base = "SDXL's refiner as the base" if score else f"SDXL as the base{', not its refiner' * target}"
            typed = called(request, f"micro_conditioning.{name}")
            raise UserError(f"{typed} needs {base}: set pretrained_model_path, or remove {typed}")


def _check_distilled(request: Request, needs: Distillation) -> None:
    s = request.sampling

    def refuse(key: str, expected: object, got: object = None) -> None:
        name = called(request, f"sampling.{key}")
        raise UserError(
            f"{name}: got {got or getattr(s, key)}, expected {expected} with {needs.name}: set "
            f"{key}={getattr(needs, key)}{needs.otherwise}"
        )

    for key in ("sampler", "timestep_spacing"):
        if (getattr(s, key) or (wanted := getattr(needs, key))) != (wanted := getattr(needs, key)):
            refuse(key, wanted)
    steps = len(s.timesteps) or s.steps or needs.steps
    if steps not in needs.possible_steps:
        few, many = min(needs.possible_steps), max(needs.possible_steps)
        refuse("steps", f"{few} to {many}" if few < many else few, steps)
    if (s.guidance_scale or 0) > needs.max_guidance_scale:
        refuse("guidance_scale", f"at most {needs.max_guidance_scale:g}")


def _check_guidance(request: Request, sampling: Sampling, facts: Facts) -> None:
    g, free, distilled = request.guidance, request.freeinit, facts.distillation
    if free and free.fast and (sampling.timesteps or distilled):
        why = distilled.name if distilled else "timesteps of your own"
        raise UserError(f"freeinit.fast: got {why}, whose number of steps is fixed: set fast to false")
    guided = sampling.guidance_scale > 1
    if g.schedule is not None and not guided:
        name = called(request, "guidance.schedule")
        raise UserError(f"{name} needs a guidance_scale above 1, got {sampling.guidance_scale:g}: raise it, or remove "
                        f"{name}")  # fmt: skip
    if g.rescale and not guided and not request.pag.scale:
        name = called(request, "guidance.rescale")
        raise UserError(f"{name} needs a guidance_scale above 1 or a pag_scale: set one, or remove {name}")
    if facts.motion and request.motion.stretch != 1 and not facts.tells_positions:
        name = called(request, "motion.stretch")
        raise UserError(f"{name}: got {request.motion.stretch:g}, expected 1: the motion module has no positional "
                        "encoding")  # fmt: skip


def _inputs(request: Request, sampling: Sampling, facts: Facts) -> Inputs:
    i = request.inputs
    window = chain_window(facts.max_frames)
    if not 0 <= i.extend < window:
        raise UserError(
            f"{called(request, 'inputs.extend')}: got {i.extend} known frames, expected 1 to {window - 1}, less than a "
            f"window of {window}"
        )
    if i.inversion and (sampling.sampler not in DETERMINISTIC or sampling.eta):
        what = f"eta {sampling.eta:g}" if sampling.eta else f"the sampler {sampling.sampler}"
        raise UserError(f"{called(request, 'inputs.inversion')}: got {what}, which adds noise of its own, expected one "
                        f"of {', '.join(DETERMINISTIC)} with eta 0")  # fmt: skip
    return replace(i, strength=default_strength(i))


def _windows(request: Request, facts: Facts) -> Windows | None:
    """The windows, no length left open; raises where the motion module was not trained on so many frames."""
    longest = facts.max_frames and int(facts.max_frames * request.motion.stretch)
    frames, w = request.size.num_frames, request.windows
    if w is None:
        if longest is not None and frames > longest and not request.inputs.extend:  # which sees a window at a time
            raise UserError(
                f"{called(request, 'size.num_frames')}: got {frames} frames, expected at most {longest}, the longest "
                f"clip {facts.motion} was trained on: animate it in overlapping windows by windows=open (closed: a "
                f"loop), make {longest} frames, or set max_frames={frames} at your own risk"
            )
        return None
    length = w.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if longest is not None and min(length, frames) > longest:
        raise UserError(
            f"{called(request, 'windows.length')}: got {length} frames, expected at most {longest}, the longest clip "
            f"{facts.motion} was trained on"
        )
    return replace(w, length=length, overlap=length // 4 if w.overlap is None else w.overlap)


def _check_sparsectrl(request: Request, windows: Windows | None, facts: Facts) -> None:
    if facts.sparsectrl_frames is None or not len(request.sparsectrl.images):
        return
    longest, frames = facts.sparsectrl_frames, request.size.num_frames
    window = windows.length if windows else chain_window(longest) if request.inputs.extend else frames
    if (seen := min(frames, window)) > longest:
        raise UserError(
            f"{called(request, 'size.num_frames')}: got {seen} frames at a time, expected at most {longest}, the "
            f"longest clip {facts.sparsectrl} was trained on: set windows=open and window_length={longest}, or "
            f"max_frames={seen} at your own risk"
        )


def _check_picture(request: Request, facts: Facts, complete: bool) -> None:
    """Whether a motion module that animates a picture has one, and no other is given one."""
    for group in PICTURE_GROUPS.values():
        given = getattr(request, group).image is not None
        name = called(request, f"{group}.image")
        if given and group != facts.picture:
            raise UserError(f"{name} needs {PICTURE_MODULES[group]} as motion_module, got {facts.motion or 'none'}")
        if complete and group == facts.picture and not given:
            raise UserError(f"{facts.motion} animates a picture, got none: set {name}")


def _check_memory(request: Request, facts: Facts) -> None:
    """Whether a call leaves alone what was decided when its networks were loaded."""
    for name in ("max", "offload", "weights") if facts.memory else ():
        got, loaded = getattr(request.memory, name), getattr(facts.memory, name)
        if got != loaded:
            raise UserError(
                f"{called(request, f'memory.{name}')}: got {got or 'none'}, but the networks were loaded with "
                f"{loaded or 'none'}: give it to from_config"
            )


def _check_loaded(request: Request, facts: Facts) -> None:
    """Whether a call asks for as many networks as its pipeline has."""
    if facts.loaded is None:
        return
    asked = {
        "controlnets.nets": len(request.controlnets.nets),
        "ip_adapters.adapters": len(request.ip_adapters.adapters),
        "mixture.modules": len(request.mixture.modules),
        "camera.path": int(bool(request.camera.path)),
    }
    for option, count in asked.items():
        if count and count != (loaded := facts.loaded.get(option.partition(".")[0], 0)):
            raise UserError(
                f"{called(request, option)}: got {count}, expected {loaded}, as many as the pipeline has loaded: name "
                "them in its config"
            )
