"""Are the files of a request there, and are they what their options say? Asked before anything heavy starts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from animatediff.checkpoints.identify import SD15_WIDTHS, FileInfo, identify, refusal
from animatediff.checkpoints.interpolator_files import check_interpolator
from animatediff.checkpoints.known_files import find_file, missing_file
from animatediff.checkpoints.sizes import trained_frames
from animatediff.config.inference_yaml import InferenceConfig, load_inference_config
from animatediff.config.networks import (
    ANIMATE_LCM,
    MOTION_VERSIONS,
    Distillation,
    Recipe,
    ScheduleConfig,
    distilled_schedule,
    recipe_of,
)
from animatediff.config.request import Request
from animatediff.config.sparsectrl_yaml import ControlKwargs, load_control_config
from animatediff.config.spellings import called, files
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.extend import chain_window
from animatediff.features.inputs import prepare_inputs
from animatediff.features.picture_checks import check_pictures
from animatediff.features.sparsectrl import condition_pixels
from animatediff.media.enlarge import load_upscaler
from animatediff.media.pictures import read_mask
from animatediff.media.sound import check_sound
from animatediff.pipeline.finish import second_pass
from animatediff.pipeline.resolve import PICTURE_GROUPS, Facts, resolve
from animatediff.pipeline.sample import count_steps
from animatediff.utils import UserError, naming

# Options whose files fit SD 1.x or SDXL alone; and UNets of their own widths alone.
OF_ONE_FAMILY = ("model.loras[", "model.embeddings[", "controlnets.", "ip_adapters.adapters", "camera.path")
OF_ONE_UNET = ("model.motion_module", "mixture.modules[", "sparsectrl.path")


@dataclass(frozen=True)
class Headers:
    """What the files of a request are.

    Attributes:
        paths: every file that the request names, by option (`config.spellings.files`).
        infos: what the weight files are.
        inference: the official inference config, if there is one.
        control: the official SparseCtrl config, if there is one.
    """

    paths: dict[str, Path]
    infos: dict[str, FileInfo]
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    control: ControlKwargs | None = None

    @property
    def motion(self) -> FileInfo | None:
        return self.infos.get("model.motion_module")

    @property
    def image(self) -> FileInfo | None:
        """The image model whose UNet is used."""
        return self.infos.get("model.personalised") or self.infos.get("model.base")

    @property
    def sdxl(self) -> bool:
        return self.image is not None and self.image.base == "SDXL"

    def recipe(self, request: Request) -> Recipe:
        """How models of this family are sampled where nobody says."""
        version = self.version(request) or (self.motion and self.motion.version)
        return recipe_of(version, sdxl=self.sdxl)

    def version(self, request: Request) -> str | None:
        """The version to load the motion module as, where its file does not tell; None leaves it to the file."""
        if request.model.version:
            return request.model.version
        undecided = self.motion is not None and self.motion.version is None
        told = undecided and self.inference.version in self.motion.candidates  # type: ignore[union-attr]
        return self.inference.version if told else None

    def distillation(self, request: Request) -> Distillation | None:
        """What a distilled motion module, image model or LoRA needs; a `version` in the request has the last word."""
        if request.model.version == "animatelcm":
            return (self.motion and self.motion.distillation) or ANIMATE_LCM
        if request.model.version:
            return None
        loras = (info for option, info in self.infos.items() if option.startswith("model.loras["))
        named = (
            replace(lora.distillation, name=f"{lora.distillation.name} ({lora.path.name})")
            for lora in loras
            if lora.distillation
        )
        first = (info.distillation for info in (self.motion, self.image) if info and info.distillation)
        return next(chain(first, named), None)

    def max_frames(self, request: Request) -> int | None:
        """The longest clip that the motion module takes; None without one."""
        if self.motion is None:
            return None
        version = self.version(request) or self.motion.version or ""
        with naming(f"motion_module: {self.motion.path}"):
            trained = trained_frames(self.motion.metadata, length=self.motion.positional_length, version=version)
        given = self.inference.unet and self.inference.unet.motion_module_kwargs.temporal_position_encoding_max_len
        return max(trained, request.model.max_frames, given or 0)

    def facts(self, request: Request) -> Facts:
        """What the headers tell `resolve`."""
        recipe = self.recipe(request)
        base = self.infos.get("model.base")
        stated = {**(base.schedule if base else {}), **(self.image.schedule if self.image else {})}
        schedule = self.inference.build_schedule(ScheduleConfig(**stated), betas=recipe.schedule)
        schedule = distilled_schedule(schedule, self.distillation(request))
        with naming(self.inference.path):
            NoiseSchedule(schedule)
        encoder, longest = self.infos.get("sparsectrl.path"), None
        if encoder:
            with naming(f"controlnet_path: {encoder.path}"):
                trained = trained_frames(encoder.metadata, length=encoder.positional_length, version="sparsectrl")
            longest = max(trained, request.model.max_frames)
        return Facts(
            schedule,
            self.distillation(request),
            spacing=self.inference.schedule.get("timestep_spacing"),
            motion=self.motion.path.name if self.motion else "",
            picture=PICTURE_GROUPS.get(self.motion.kind, "") if self.motion else "",
            max_frames=self.max_frames(request),
            sparsectrl=encoder.path.name if encoder else "",
            sparsectrl_frames=longest,
            recipe=recipe,
            sdxl=self.sdxl,
            refiner=self.sdxl and self.image.version == "refiner",  # type: ignore[union-attr]
        )


@dataclass(frozen=True)
class Checked:
    """A request with nothing left open, its files, and how many steps a sampler takes for each of its clips."""

    request: Request
    headers: Headers
    steps: int


def check_requests(requests: Iterable[Request], *, complete: bool = True) -> list[Checked]:
    """Look at every file of every request, without loading any. complete: as of `refusals`.

    Raises:
        UserError: a file is missing, broken, or something else than its option says; the motion module contradicts
            the inference config or was not trained for as many frames; a picture cannot be read.
    """
    requests = list(requests)
    found = [_find_all(request) for request in requests]  # every file of every request, before the first is opened
    infos: dict[Path, FileInfo] = {}
    headers = []
    for request, paths in zip(requests, found, strict=True):
        for option, file in files(request).items():
            if file.kind.kinds and (path := paths[option]) not in infos:
                with naming(f"{_entry(request)}{file.called}"):
                    infos[path] = identify(path)
        weights = {option: infos[path] for option, path in paths.items() if path in infos}
        headers.append(Headers(paths, weights))
    return [_check(request, known, complete) for request, known in zip(requests, headers, strict=True)]


def _entry(request: Request) -> str:
    return f"entry {request.output.name}: " if request.output.name else ""


def _find_all(request: Request) -> dict[str, Path]:
    paths = {}
    for option, file in files(request).items():
        path = find_file(file.path)
        if path is None:
            other = " (or give another image model of its family by --pretrained-model-path)" * (option == "model.base")
            raise UserError(f"{_entry(request)}{file.called}: {missing_file(file.path)}{other}")
        paths[option] = path
    return paths


def _check(request: Request, headers: Headers, complete: bool) -> Checked:
    for option, file in files(request).items():
        if file.kind.kinds and headers.infos[option].kind not in file.kind.kinds:
            raise UserError(f"{_entry(request)}{file.called}: {refusal(headers.infos[option], file.kind.what)}")
    if "model.inference_config" in headers.paths:
        headers = replace(headers, inference=load_inference_config(headers.paths["model.inference_config"]))
    with naming(_entry(request).removesuffix(": ")):
        _check_family(request, headers)
        if headers.motion is not None:
            _check_version(request, headers)
        _check_versions_beside(request, headers)
        if "sparsectrl.config" in headers.paths:
            kind = headers.infos["sparsectrl.path"].version
            headers = replace(headers, control=load_control_config(headers.paths["sparsectrl.config"], kind=kind))
        longest = headers.max_frames(request)
        request = resolve(request, headers.facts(request), complete=complete)
        size = request.size
        if request.motion.mask:
            with naming(called(request, "motion.mask")):
                read_mask(headers.paths["motion.mask"], height=size.height, width=size.width)
        if len(request.sparsectrl.images):
            condition_pixels(request.sparsectrl, (size.height, size.width))
        check_pictures(request, complete=complete)
        inputs = prepare_inputs(
            request.inputs,
            frames=size.num_frames,
            height=size.height,
            width=size.width,
            window=chain_window(longest),
        )
        extended = inputs is not None and inputs.video is not None and inputs.extend
        known = inputs.video.shape[1] if extended else 0  # type: ignore[union-attr]
        steps = count_steps(request, longest=longest, known=known)
        if request.finish.audio:
            check_sound(headers.paths["finish.audio"])
        if request.finish.upscaler:
            with naming(called(request, "finish.upscaler")):
                load_upscaler(headers.paths["finish.upscaler"])
        if request.finish.interpolator:
            with naming(called(request, "finish.interpolator")):
                check_interpolator(headers.paths["finish.interpolator"])
        if request.finish.strength:
            with naming("second pass"):
                second = resolve(second_pass(request), headers.facts(request))
            steps += count_steps(second, longest=longest)
    return Checked(request, headers, steps)


def _check_version(request: Request, headers: Headers) -> None:
    motion, version = headers.motion, request.model.version
    assert motion is not None
    where = f"motion_module: {motion.path}"
    if motion.version is None and headers.version(request) is None:
        raise UserError(
            f"{where}: its version cannot be told ({motion.evidence}): add "
            f"{' or '.join(f'`version: {name}`' for name in motion.candidates)} to the entry"
        )
    if version and motion.version not in (version, "animatelcm", None):  # of these two the file is not sure
        raise UserError(f"{where} is a {motion.version} module, but the entry says `version: {version}`: remove it")
    headers.inference.check_version(MOTION_VERSIONS[headers.version(request) or motion.version or ""])


def _check_versions_beside(request: Request, headers: Headers) -> None:
    """Whether further motion modules tell their versions, or the request does."""
    for i, module in enumerate(request.mixture.modules):
        info = headers.infos.get(f"mixture.modules[{i}].path")
        if info and info.version is None and not module.version:
            raise UserError(
                f"{called(request, 'mixture.modules')}: {info.path}: its version cannot be told ({info.evidence}): add "
                f"{' or '.join(f'`version: {name}`' for name in info.candidates)} beside its path"
            )


def _of_one_kind(a: str, b: str) -> bool:
    return a.split(" layout")[0] == b.split(" layout")[0]


def _widths(base: str) -> set[int]:
    """Of the levels that a file has; a motion module need not be at all of them."""
    return {int(width) for width in re.findall(r"\d+", base.partition(" of widths ")[2])} or set(SD15_WIDTHS)


def _check_family(request: Request, headers: Headers) -> None:
    """Motion modules and SparseCtrl encoders fit UNets of one family and its widths, LoRAs those of one family."""
    image, base, families = headers.image, headers.infos.get("model.base"), ("SD 1.x", "SDXL")
    if base and image and base.base == "SDXL" and image.base.startswith("SD 1.x"):
        raise UserError(
            f"{called(request, 'model.personalised')}: {image.path}: this is {image.summary}, but the base {base.path} "
            "is of SDXL: give it as the base, by pretrained_model_path"
        )
    for option, file in files(request).items():
        info = headers.infos.get(option)
        if image is None or info is None or not option.startswith(OF_ONE_FAMILY):
            continue
        told = info.base.split(" layout")[0]
        if told in families and not _of_one_kind(told, image.base):
            what = info.summary if told in info.summary else f"{info.summary}, made for {told}"
            raise UserError(
                f"{file.called}: {info.path}: this is {what}, but {image.path} is of {image.base}: choose another of "
                "either"
            )
    for option, file in files(request).items():
        other = headers.infos.get(option)
        if image is None or other is None or not option.startswith(OF_ONE_UNET) or other.version is None:
            continue  # of a module that does not tell its version, nor is its base
        known = other.base.startswith(families) and image.base.startswith(families)
        if known and not (_of_one_kind(other.base, image.base) and _widths(other.base) <= _widths(image.base)):
            raise UserError(
                f"{file.called}: {other.path}: this is {other.summary} for {other.base}, but {image.path} is of "
                f"{image.base}: choose another of either"
            )
