"""Prompt configs: what to animate, with which files. The official grammars, read into dataclasses, values only."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from animatediff.config.dataclass_io import build_dataclass, convert, dump_yaml, read_yaml
from animatediff.config.networks import MOTION_VERSIONS
from animatediff.config.sparsectrl_yaml import check_scales, condition_frames
from animatediff.config.steering import Steering
from animatediff.utils import UserError, describe, naming, unknown_key

Prompt = str | dict[int, str]  # a text, or keyframes: frame -> text
Format = Literal["gif", "mp4", "webp", "png"]
MAX_SEED = 2**64 - 1
MAX_FPS = {"gif": 50, "mp4": 1000, "webp": 1000, "png": 1000}  # GIF counts 1/100 s and viewers want two of them
SD15_FOLDER = "models/StableDiffusion/stable-diffusion-v1-5"  # where the official script looks for the base model


@dataclass(frozen=True)
class MotionLoRAEntry:
    """A MotionLoRA and the factor its low-rank update is multiplied with."""

    path: str
    alpha: float = 1.0


@dataclass(frozen=True)
class EmbeddingEntry:
    """A textual inversion, and the word that stands for it in prompts: by default its file's stem."""

    path: str
    name: str = ""


@dataclass(frozen=True)
class AnimateEntry(Steering):
    """One model and the prompts it animates. The names are the official prompt YAML's keys, and those of Steering.

    A path of "" means: none, which all but the base model's may be. `n_prompt` and `seed` hold one value for all
    prompts, or one per prompt. A prompt is a text, or keyframes {frame: text, …} between which it travels.

    Raises:
        UserError: a value is out of its range, or two lists do not fit together.
    """

    prompt: tuple[Prompt, ...]
    n_prompt: tuple[Prompt, ...] = ("",)
    head_prompt: str = ""  # before every text of `prompt`, with a comma
    tail_prompt: str = ""  # after every text of `prompt`
    prompt_interpolation: Literal["lerp", "slerp"] = "lerp"  # between keyframes
    prompt_loop: bool | None = None  # the last keyframe goes on to the first; where window_schedule loops
    prompt_fixed_ratio: float = 0.0  # of every interval between keyframes: as long the first text stays
    prompt_weighting: bool = False  # read (word:1.2), [word] and BREAK in prompts; else brackets are text, as official
    clip_skip: int = 1  # layer of the text encoder, from the end: 1 the last, 2 the one before it, …
    seed: tuple[int, ...] = (-1,)  # 0 … 2^64 - 1; -1 draws one and records it
    random_seed: tuple[int, ...] = ()  # seeds that an earlier run drew; they take the place of -1
    # Of these five, what is not said is what a distilled motion module needs, else as the comments say.
    steps: int | None = None  # 25
    guidance_scale: float | None = None  # 7.5; 1 and below: no unconditional pass
    sampler: str = ""  # ddim
    timestep_spacing: str = ""  # as the inference config has it, else leading (lcm: lcm)
    timesteps: tuple[float, ...] = ()  # these, from noisy to clean, in place of timestep_spacing and steps
    eta: float = 0.0  # 0 is deterministic DDIM, 1 has DDPM's variance
    L: int = 16  # frames
    H: int = 512  # pixels
    W: int = 512
    window_schedule: str = ""  # open, closed, static, uniform: overlapping windows of frames; "": the clip at once
    window_length: int = 0  # frames; 0: 16, or as many as the motion module was trained on, if less
    window_overlap: int | None = None  # frames; a quarter of window_length
    window_fuse: str = "pyramid"  # or flat, overlap-linear, gaussian
    window_stride: int = 1  # of uniform: levels of windows of every 1st, 2nd, 4th … frame
    fps: float = 8.0
    format: Format = "gif"
    name: str = ""  # how messages and metadata call this entry

    # Pictures and video in: a file that ffmpeg or Pillow reads, or a folder of pictures.
    video: str = ""  # to start from: its first L frames, or a single picture that stands still
    image: str = ""  # the first frame
    last_image: str = ""
    mask: str = ""  # white: where the video is painted anew; one for all frames, or a clip or folder of them
    strength: float | None = None  # 0 (the video comes back) to 1; 0.8, with an image 0.9, with mask or extend 1
    inversion: bool = False  # start from the noise that DDIM inversion finds in the video
    inversion_prompt: str = ""  # what the video shows
    extend: int = 0  # go on from the video's end to L frames; so many are known in each window of the chain
    image_ramp: float = 32.0  # frames after which nothing of an image is left at the start

    pretrained_model_path: str = SD15_FOLDER  # diffusers folder or SD 1.x single file
    dreambooth_path: str = ""  # personalised model: replaces the base's UNet, text encoder and, where present, VAE
    vae_path: str = ""  # in place of the VAE that these two have: a VAE's own file or folder, or an image model
    lora_model_path: str = ""  # kohya LoRA
    lora_alpha: float = 0.8
    lora_alpha_rule: Literal["standard", "official"] = "standard"  # "official" ignores the file's own alpha / rank
    motion_module: str = ""  # "": the image model alone, frames do not know each other
    version: str = ""  # of the motion module, where its file cannot tell
    max_frames: int = 0  # allow clips of this length, longer than the module was trained on
    norm_over_frames: bool = False  # run the module's GroupNorm over all frames, as diffusers does
    motion_module_lora_configs: tuple[MotionLoRAEntry, ...] = ()
    adapter_lora_path: str = ""  # domain adapter
    adapter_lora_scale: float = 1.0
    embeddings: tuple[EmbeddingEntry, ...] = ()  # textual inversions: paths, or {path: …, name: …}
    inference_config: str = ""

    controlnet_path: str = ""  # SparseCtrl encoder
    controlnet_config: str = ""  # its official config, which the weights make superfluous
    controlnet_images: tuple[str, ...] = ()  # cut to the clip's shape around their centre
    controlnet_image_indexs: tuple[int, ...] = (0,)  # the frame of each image; -1 is the last one
    controlnet_scale: tuple[float, ...] = (1.0,)  # of its effect, one for all frames or one for each; 1 as trained
    normalize_condition_images: bool = False  # grey, from black to white: scribbles on other grounds

    def __post_init__(self) -> None:
        loras = {"lora_model_path": self.lora_model_path, "motion_module_lora_configs": self.motion_module_lora_configs}
        named = [key for key, given in loras.items() if given]
        self.check(self.L, windows=bool(self.window_schedule), motion=bool(self.motion_module), loras=named)
        _check_prompts(self)
        if not self.pretrained_model_path:
            raise UserError("pretrained_model_path: got none, expected the base model: a diffusers folder or a file")
        for key in ("steps", "L", "H", "W", "clip_skip"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{key}: got {value}, expected at least 1")
        for key in ("H", "W"):
            if (value := getattr(self, key)) % 8:
                raise UserError(f"{key}: got {value}, expected a multiple of 8: use {value - value % 8 or 8}")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise UserError(f"guidance_scale: got {self.guidance_scale:g}, expected 0 or more (1 turns guidance off)")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta: got {self.eta:g}, expected 0 (deterministic) to 1")
        if not 0 < self.fps <= MAX_FPS[self.format]:
            most = MAX_FPS[self.format]
            raise UserError(f"fps: got {self.fps:g}, expected above 0 and, for {self.format}, at most {most}")
        known = [name for name, motion in MOTION_VERSIONS.items() if motion.up_block_modules]
        if self.version and self.version not in known:
            raise UserError(f"version: got {self.version!r}, expected one of {', '.join(known)}")
        _check_control(self)

    def weight_paths(self) -> dict[str, str]:
        """Every weight file this entry names, by the key that names it, in loading order."""
        paths = {
            "pretrained_model_path": self.pretrained_model_path,
            "motion_module": self.motion_module,
            "dreambooth_path": self.dreambooth_path,
            "vae_path": self.vae_path,
            "lora_model_path": self.lora_model_path,
            "adapter_lora_path": self.adapter_lora_path,
            "controlnet_path": self.controlnet_path,
        }
        for i, lora in enumerate(self.motion_module_lora_configs):
            paths[f"motion_module_lora_configs[{i}].path"] = lora.path
        for i, embedding in enumerate(self.embeddings):
            paths[f"embeddings[{i}].path"] = embedding.path
        return {key: path for key, path in paths.items() if path}

    def other_paths(self) -> dict[str, str]:
        """Every file this entry names that holds no weights, by key."""
        paths = {"inference_config": self.inference_config, "controlnet_config": self.controlnet_config}
        paths |= {f"controlnet_images[{i}]": path for i, path in enumerate(self.controlnet_images)}
        return {key: path for key, path in paths.items() if path} | self.input_paths()

    def input_paths(self) -> dict[str, str]:
        """Every picture and clip this entry starts from, by the key that names it."""
        paths = {"video": self.video, "image": self.image, "last_image": self.last_image, "mask": self.mask}
        return {key: path for key, path in paths.items() if path}

    def per_prompt(self) -> list[tuple[Prompt, Prompt, int]]:
        """(prompt, negative prompt, seed) of every prompt; recorded seeds take the place of -1."""
        n = len(self.prompt)
        prompts = [
            {frame: self._framed(text) for frame, text in prompt.items()}
            if isinstance(prompt, dict)
            else self._framed(prompt)
            for prompt in self.prompt
        ]
        negatives = self.n_prompt * n if len(self.n_prompt) == 1 else self.n_prompt
        seeds = self.seed * n if len(self.seed) == 1 else self.seed
        drawn = self.random_seed or seeds
        seeds = tuple(b if a == -1 else a for a, b in zip(seeds, drawn, strict=True))
        return list(zip(prompts, negatives, seeds, strict=True))

    def _framed(self, text: str) -> str:
        return ", ".join(part for part in (self.head_prompt, text, self.tail_prompt) if part.strip())


def _check_prompts(entry: AnimateEntry) -> None:
    n = len(entry.prompt)
    if not n:
        raise UserError("prompt: got an empty list, expected at least one prompt")
    for key, allowed in (("n_prompt", (1, n)), ("seed", (1, n)), ("random_seed", (0, n))):
        if (count := len(getattr(entry, key))) not in allowed:
            raise UserError(
                f"{key}: got {count} value{'s' * (count != 1)} for {n} prompt{'s' * (n > 1)}, "
                f"expected {' or '.join(str(a) for a in sorted(set(allowed)) if a)}: "
                "give one for all prompts, or one per prompt"
            )
    for key in ("prompt", "n_prompt"):
        for prompt in getattr(entry, key):
            if isinstance(prompt, dict):
                check_keyframes(key, prompt, entry.L)
    for key in ("seed", "random_seed"):
        if bad := [s for s in getattr(entry, key) if not -1 <= s <= MAX_SEED]:
            raise UserError(f"{key}: got {bad[0]}, expected 0 to 2^64 - 1, or -1 to draw one")


def _check_control(entry: AnimateEntry) -> None:
    if not entry.controlnet_path:
        said = [k for k, v in vars(entry).items() if k.startswith("controlnet_") and v != getattr(AnimateEntry, k)]
        if said:
            raise UserError(f"got {said[0]} without controlnet_path, expected a SparseCtrl encoder: add one")
        return
    if entry.controlnet_images:  # in the library, a call may bring them
        with naming("controlnet_image_indexs"):
            condition_frames(entry.controlnet_image_indexs, images=len(entry.controlnet_images), frames=entry.L)
    with naming("controlnet_scale"):
        check_scales(entry.controlnet_scale, frames=entry.L)


def check_keyframes(where: str, keyframes: Mapping[int, Any], frames: int) -> None:
    """Raises UserError unless there are keyframes, all within a clip of so many frames."""
    if not keyframes:
        raise UserError(f"{where}: got no keyframes, expected at least one, such as 0")
    if outside := [frame for frame in keyframes if not 0 <= frame < frames]:
        raise UserError(
            f"{where}: got a keyframe at {outside[0]}, expected 0 to {frames - 1}, as the clip has {frames} frames: "
            "move it, or make the clip longer by L"
        )


@dataclass(frozen=True)
class RunConfig:
    """A prompt config as read: its name (the file's stem), its entries, and what an earlier run recorded in it."""

    name: str
    entries: tuple[AnimateEntry, ...]
    provenance: dict[str, Any] = field(default_factory=dict)  # versions, and path -> sha256 of the weight files


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a prompt config.

    Four shapes are understood: a list of entries (official, 2024), a mapping of name -> entry (official, 2023;
    with `base` and `path`, and a list of motion modules, each of which is run), a single entry, and the
    `config.yaml` that a run writes beside its samples.

    Args:
        path: the YAML file.
        overrides: raw values that replace every entry's, as from `parse_overrides`. A new `prompt` keeps only
            the first of an entry's negative prompts and seeds, which belonged to the old list.

    Raises:
        UserError: no such file, broken YAML, or an unknown, missing, mistyped or out-of-range value.
    """
    path = Path(path)
    overrides = dict(overrides or {})
    _check_overrides(overrides)
    raw = read_yaml(path)
    provenance = {}
    if isinstance(raw, dict) and isinstance(raw.get("entries"), list):
        if unknown := set(raw) - {"entries", "provenance"}:
            raise UserError(f"{path}: {unknown_key(min(unknown), ['entries', 'provenance'])}")
        raw, provenance = raw["entries"], raw.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise UserError(f"{path}: provenance: got {describe(provenance)}, expected what a run recorded: remove it")
    entries = []
    for name, values in _named_entries(raw, path):
        where = f"{path}, entry {name}"
        if not isinstance(values, dict):
            raise UserError(f"{where}: got {describe(values)}, expected keys such as prompt, motion_module, seed")
        for variant in _expand(dict(values), where):
            variant.setdefault("name", str(name))
            entries.append(build_dataclass(AnimateEntry, _override(variant, overrides), where=where))
    if not entries:
        raise UserError(f"{path}: got no entries, expected a list of them, each with a prompt")
    return RunConfig(path.stem, tuple(entries), provenance)


def config_of(values: Mapping[str, Any], *, name: str) -> RunConfig:
    """A config of one entry, from raw values as of `parse_overrides` alone.

    Raises:
        UserError: an unknown, missing, mistyped or out-of-range value.
    """
    return RunConfig(name, (build_dataclass(AnimateEntry, {"name": name, **values}, where="command line"),))


def _named_entries(raw: Any, path: Path) -> list[tuple[Any, Any]]:
    """The entries of either grammar as (name, values)."""
    known = {f.name for f in dataclasses.fields(AnimateEntry)} | {"path", "base", "domain_lora_scale", "prompt_map"}
    if isinstance(raw, list):
        return list(enumerate(raw, 1))
    if isinstance(raw, dict):
        single = known & set(raw) or not all(isinstance(v, dict) for v in raw.values())
        return [(1, raw)] if single else list(raw.items())
    raise UserError(f"{path}: got {describe(raw)}, expected a list of entries, each with a prompt")


def _expand(values: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Other spellings in ours: of 2023 `path`/`base`, `domain_lora_scale`, an entry for each of several modules;
    `prompt_map` of animatediff-cli-prompt-travel."""
    if "path" in values or "base" in values:
        if clash := {"dreambooth_path", "lora_model_path"} & set(values):
            raise UserError(f"{where}: got both path/base and {min(clash)}, expected one spelling: remove path/base")
        model, base = values.pop("path", None) or "", values.pop("base", None) or ""
        values |= {"dreambooth_path": base or model, "lora_model_path": model if base else ""}
    if "domain_lora_scale" in values:
        if "adapter_lora_scale" in values:
            raise UserError(f"{where}: got both adapter_lora_scale and domain_lora_scale, expected one: remove either")
        values["adapter_lora_scale"] = values.pop("domain_lora_scale")
    if "prompt_map" in values:
        if "prompt" in values:
            raise UserError(f"{where}: got both prompt and prompt_map, expected one of them: remove either")
        values["prompt"] = values.pop("prompt_map")
    modules = values.get("motion_module")
    if not isinstance(modules, list):
        return [values]
    if not modules:
        raise UserError(f'{where}: motion_module: got an empty list, expected a path (or "" for none)')
    return [values | {"motion_module": module} for module in modules]


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """Their keys and types, before the file's own get a chance to be blamed."""
    hints = typing.get_type_hints(AnimateEntry)
    for key, value in overrides.items():
        if key not in hints:
            raise UserError(f"override: {unknown_key(key, list(hints))}")
        convert(value, hints[key], f"override: {key}")


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(values)
    if "prompt" in overrides:
        values.pop("random_seed", None)
        for key in ("n_prompt", "seed"):
            if isinstance(old := values.get(key), list):
                values[key] = old[:1]
    if "seed" in overrides:
        values.pop("random_seed", None)
    return values | dict(overrides)


def dump_config(config: RunConfig) -> str:
    """YAML text that `load_config` reads back as the same entries and provenance."""
    entries = []
    for entry in config.entries:
        values = dataclasses.asdict(entry)
        for key in ("motion_module_lora_configs", "embeddings"):
            values[key] = [dict(item) for item in values[key]]
        entries.append({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
    return dump_yaml({"entries": entries, "provenance": config.provenance})
