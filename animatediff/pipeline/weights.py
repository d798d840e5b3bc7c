"""Are the weight files of a run there, and are they what their keys say? Asked before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import animatediff
from animatediff.checkpoints.identify import FileInfo, identify, refusal
from animatediff.checkpoints.sizes import trained_frames
from animatediff.config.inference_yaml import InferenceConfig, load_inference_config
from animatediff.config.networks import ANIMATE_LCM, MOTION_VERSIONS, Distillation
from animatediff.config.prompt_yaml import AnimateEntry
from animatediff.config.sparsectrl_yaml import ControlKwargs, load_control_config
from animatediff.diffusion.samplers import find_sampler
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.features.prompt_travel import Travel
from animatediff.features.sparsectrl import read_condition_images
from animatediff.features.windows import Windows
from animatediff.media.mask import read_mask
from animatediff.pipeline.sampling import Sampling, complete_sampling
from animatediff.pipeline.start import SETTINGS, chain_window, check_start, links, read_inputs, take_given
from animatediff.utils import UserError, naming

DEFAULT_WINDOW = 16  # frames: what all motion modules were trained on
REPOSITORY = Path(animatediff.__file__).resolve().parents[1]

# key of a prompt config -> (what belongs there, the kinds of file that are it)
EXPECTED = {
    "pretrained_model_path": ("an SD 1.x image model", ("sd1-checkpoint", "diffusers-folder")),
    "motion_module": ("a motion module", ("motion-module", "motion-adapter")),
    "dreambooth_path": ("an SD 1.x image model", ("sd1-checkpoint", "diffusers-folder")),
    "vae_path": ("a VAE", ("vae", "sd1-checkpoint", "diffusers-folder")),
    "lora_model_path": ("a LoRA of an image model", ("lora",)),
    "adapter_lora_path": ("a domain adapter", ("domain-adapter", "lora")),
    "motion_module_lora_configs": ("a MotionLoRA", ("motion-lora",)),
    "controlnet_path": ("a SparseCtrl encoder", ("sparsectrl",)),
    "embeddings": ("a textual inversion for SD 1.x", ("textual-inversion",)),
}

MOTION_FILES = "https://huggingface.co/guoyww/animatediff"
IMAGE_MODELS = "https://huggingface.co/guoyww/animatediff_t2i_backups"
ANIMATE_LCM_FILES = "https://huggingface.co/wangfuyun/AnimateLCM"
LIGHTNING_FILES = "https://huggingface.co/ByteDance/AnimateDiff-Lightning"
SD15 = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
VAES = "https://huggingface.co/stabilityai/sd-vae-ft-mse"
# where a file of this name is published
SOURCES = {
    **dict.fromkeys(("mm_sd_v14.ckpt", "mm_sd_v15.ckpt", "mm_sd_v15_v2.ckpt", "v3_sd15_mm.ckpt"), MOTION_FILES),
    **dict.fromkeys(("v3_sd15_adapter.ckpt",), MOTION_FILES),
    **dict.fromkeys(("v3_sd15_sparsectrl_rgb.ckpt", "v3_sd15_sparsectrl_scribble.ckpt"), MOTION_FILES),
    **{
        f"v2_lora_{move}.ckpt": MOTION_FILES
        for move in (
            *("ZoomIn", "ZoomOut", "PanLeft", "PanRight"),
            *("TiltUp", "TiltDown", "RollingClockwise", "RollingAnticlockwise"),
        )
    },
    **dict.fromkeys(
        (
            "realisticVisionV60B1_v51VAE.safetensors",
            "majicmixRealistic_v4.safetensors",
            "majicmixRealistic_v5Preview.safetensors",
            "leosamsFilmgirlUltra_velvia20Lora.safetensors",
            "leosamsHelloworldXL_filmGrain20.safetensors",
            "toonyou_beta3.safetensors",
            "rcnzCartoon3d_v10.safetensors",
            "lyriel_v16.safetensors",
            "TUSUN.safetensors",
        ),
        IMAGE_MODELS,
    ),
    **dict.fromkeys(("AnimateLCM_sd15_t2v.ckpt", "AnimateLCM_sd15_t2v_lora.safetensors"), ANIMATE_LCM_FILES),
    **{f"animatediff_lightning_{n}step_comfyui.safetensors": LIGHTNING_FILES for n in (1, 2, 4, 8)},
    **dict.fromkeys((f"vae-ft-mse-840000-ema-pruned.{end}" for end in ("safetensors", "ckpt")), f"{VAES}-original"),
    "sd-vae-ft-mse": VAES,
    "stable-diffusion-v1-5": SD15,
    "v1-5-pruned-emaonly.safetensors": SD15,
    "v1-5-pruned.safetensors": SD15,
}


@dataclass(frozen=True)
class CheckedEntry:
    """An entry whose files are all there: their places by key, what the motion module is, how it is sampled.

    The entry's own keys say what `sampling` and `windows` say, so that nothing in it is left open.
    """

    entry: AnimateEntry
    files: dict[str, Path]
    inference: InferenceConfig
    motion: FileInfo | None
    sampling: Sampling
    windows: Windows | None = None
    control: ControlKwargs | None = None  # what the entry's controlnet_config says
    travel: Travel = Travel()
    steps: int = 0  # that the sampler takes in all, in every window of a chain

    @property
    def version(self) -> str | None:
        """The version to load the motion module as, where its file does not tell; None leaves it to the file."""
        if self.entry.version:
            return self.entry.version
        undecided = self.motion is not None and self.motion.version is None
        return self.inference.version or None if undecided else None

    @property
    def distillation(self) -> Distillation | None:
        """What a distilled motion module needs; None for others, and where the entry says it is another version."""
        return _distillation(self.entry, self.motion)

    @property
    def max_frames(self) -> int | None:
        """The longest clip its motion module takes; None without one."""
        if self.motion is None:
            return None
        version = self.version or self.motion.version or ""
        with naming(f"motion_module: {self.motion.path}"):
            trained = trained_frames(self.motion.metadata, length=self.motion.positional_length, version=version)
        asked = self.inference.unet and self.inference.unet.motion_module_kwargs.temporal_position_encoding_max_len
        return max(trained, self.entry.max_frames, asked or 0)


def check_entries(entries: Iterable[AnimateEntry]) -> list[CheckedEntry]:
    """Look at every file of every entry, without loading any.

    Raises:
        UserError: a file is missing, broken, or something else than its key says; the motion module contradicts the
            inference config or was not trained for as many frames; a condition image cannot be read.
    """
    entries = list(entries)
    for entry in entries:
        if entry.sampler:
            find_sampler(entry.sampler)
    found = [_find_all(entry) for entry in entries]  # every file of every entry, before the first is opened
    infos: dict[Path, FileInfo] = {}
    for entry, files in zip(entries, found, strict=True):
        for key, path in files.items():
            if key not in entry.other_paths() and path not in infos:
                with naming(f"entry {entry.name}: {key}"):
                    infos[path] = identify(path)
    return [_check(entry, files, infos) for entry, files in zip(entries, found, strict=True)]


def find_file(path: str) -> Path | None:
    """An existing file or folder: as given (from the current folder), or from the repository's root."""
    candidates = (Path(path).expanduser(), REPOSITORY / path)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _find_all(entry: AnimateEntry) -> dict[str, Path]:
    files = {}
    for key, path in (entry.weight_paths() | entry.other_paths()).items():
        file = find_file(path)
        if file is None:
            other = " (or give another SD 1.x model by --pretrained-model-path)" * (key == "pretrained_model_path")
            raise UserError(f"entry {entry.name}: {key}: {_missing(path)}{other}")
        files[key] = file
    return files


def _missing(path: str) -> str:
    searched = Path.cwd() / path if Path.cwd() == REPOSITORY else f"{Path.cwd() / path} and {REPOSITORY / path}"
    searched = path if Path(path).is_absolute() else searched
    line = f"there is no {path} (searched: {searched})"
    if source := SOURCES.get(Path(path).name):
        return f"{line}; download it from {source} and put it there: nothing is downloaded for you"
    return f"{line}; check the path, or put the file there"


def _check(entry: AnimateEntry, files: dict[str, Path], infos: dict[Path, FileInfo]) -> CheckedEntry:
    inference = load_inference_config(files["inference_config"]) if "inference_config" in files else InferenceConfig()
    for key, path in files.items():
        what, kinds = EXPECTED.get(key.partition("[")[0], ("", ()))
        if kinds and infos[path].kind not in kinds:
            raise UserError(f"entry {entry.name}: {key}: {refusal(infos[path], what)}")
    if entry.motion_module_lora_configs and not entry.motion_module:
        raise UserError(
            f"entry {entry.name}: got motion_module_lora_configs without a motion_module, expected the one they were "
            "trained on, v2 for the official ones: add it"
        )
    motion = infos[files["motion_module"]] if "motion_module" in files else None
    with naming(f"entry {entry.name}"):
        sampling = _sampling(entry, inference, _distillation(entry, motion))
        travel = Travel(entry.prompt_interpolation, entry.prompt_loop, entry.prompt_fixed_ratio)
        checked = CheckedEntry(replace(entry, **asdict(sampling)), files, inference, motion, sampling, travel=travel)
        if motion is not None:
            _check_version(checked)
        if entry.motion_mask:
            read_mask(find_file(entry.motion_mask) or entry.motion_mask, height=entry.H, width=entry.W)
        windows = _windows(entry, checked.max_frames and int(checked.max_frames * entry.pe_stretch))
        if "controlnet_path" in files:
            checked = replace(checked, control=_control(entry, files, infos[files["controlnet_path"]], windows))
        checked = _check_inputs(checked, windows)
    if windows is None:
        return checked
    said = {f"window_{key}": value for key, value in asdict(windows).items()}
    return replace(checked, entry=replace(checked.entry, **said), windows=windows)


def _distillation(entry: AnimateEntry, motion: FileInfo | None) -> Distillation | None:
    """A `version` in the entry has the last word."""
    if entry.version == "animatelcm":
        return ANIMATE_LCM
    return None if motion is None or entry.version else motion.distillation


def _sampling(entry: AnimateEntry, inference: InferenceConfig, distilled: Distillation | None) -> Sampling:
    asked = {key: getattr(entry, key) for key in asdict(Sampling())}
    asked["timestep_spacing"] = entry.timestep_spacing or inference.schedule.get("timestep_spacing")
    sampling = complete_sampling(asked, Sampling(), distilled)
    sampling.check_steering(entry, distilled)
    schedule = inference.build_schedule("v_prediction")  # what the base model predicts is of no interest yet
    with naming(inference.path):
        NoiseSchedule(schedule)
    if sampling.steps > (most := schedule.num_train_timesteps):
        raise UserError(f"steps: got {sampling.steps}, expected at most {most}")
    sampling.plan(schedule)
    return sampling


def _windows(entry: AnimateEntry, longest: int | None) -> Windows | None:
    """The windows an entry asks for, if it does; `longest` is the longest clip that its motion module takes."""
    keys = ("length", "overlap", "fuse", "stride")
    said = {
        key: value
        for key in keys
        if (value := getattr(entry, f"window_{key}")) != getattr(AnimateEntry, f"window_{key}")
    }
    if entry.window_schedule:
        length = entry.window_length or min(DEFAULT_WINDOW, longest or DEFAULT_WINDOW)
        windows = Windows(entry.window_schedule, **{"length": length, "overlap": length // 4} | said)
        if longest is not None and min(length, entry.L) > longest:
            raise UserError(f"window_length: got {length} frames, expected at most {longest}, {_trained(entry)}")
        return windows
    if said:
        key = f"window_{min(said)}"
        raise UserError(
            f"{key}: got {getattr(entry, key)} without a window_schedule: add window_schedule=open, or remove it"
        )
    if longest is not None and entry.L > longest and not entry.extend:  # which needs no more than a window at a time
        raise UserError(
            f"L: got {entry.L} frames, expected at most {longest}, {_trained(entry)}: animate it in overlapping "
            f"windows by window_schedule=open (closed: a loop), use L={longest}, or max_frames={entry.L} at your "
            "own risk"
        )
    return None


def _control(
    entry: AnimateEntry, files: dict[str, Path], encoder: FileInfo, windows: Windows | None
) -> ControlKwargs | None:
    """What the entry's controlnet_config says; raises where encoder, config and images do not fit the clip."""
    with naming(f"controlnet_path: {encoder.path}"):
        trained = trained_frames(encoder.metadata, length=encoder.positional_length, version="sparsectrl")
    longest = max(trained, entry.max_frames)
    window = windows.length if windows else chain_window(longest) if entry.extend else entry.L
    seen = min(entry.L, window)
    if seen > longest:
        raise UserError(
            f"L: got {seen} frames at a time, expected at most {longest}, the longest clip {encoder.path.name} was "
            f"trained on: set window_schedule and window_length={longest}, or max_frames={seen} at your own risk"
        )
    for i in range(len(entry.controlnet_images)):
        with naming(f"controlnet_images[{i}]"):
            read_condition_images([files[f"controlnet_images[{i}]"]], (entry.H, entry.W))
    if "controlnet_config" not in files:
        return None
    return load_control_config(files["controlnet_config"], kind=encoder.version)


def _check_inputs(checked: CheckedEntry, windows: Windows | None) -> CheckedEntry:
    """With the number of steps and, where it starts from pictures or a video, their strength."""
    entry, sampling, window = checked.entry, checked.sampling, chain_window(checked.max_frames)
    given = take_given(
        **read_inputs(checked.files, frames=entry.L, extend=entry.extend),
        **{key: getattr(entry, key) for key in SETTINGS},
        frames=entry.L,
        height=entry.H,
        width=entry.W,
        window=window,
    )
    steps = sampling.iteration_steps(entry.freeinit)
    if given is None:
        return replace(checked, steps=sum(steps))
    check_start(given, sampling, entry)
    steps = sum(given.steps(count) for count in steps)
    if given.video is not None and given.extend and not windows:
        steps *= len(links(given.video.shape[1], entry.L, window=window, overlap=given.extend))
    return replace(checked, entry=replace(checked.entry, strength=given.strength), steps=steps)


def _trained(entry: AnimateEntry) -> str:
    return f"the longest clip {Path(entry.motion_module).name} was trained on"


def _check_version(checked: CheckedEntry) -> None:
    motion = checked.motion
    assert motion is not None
    where = f"motion_module: {motion.path}"
    if motion.version is None and checked.version is None:
        raise UserError(
            f"{where}: v1 and v3 modules look the same without their positional encoding: add `version: v1` or "
            "`version: v3` to the entry"
        )
    entry = checked.entry
    if entry.version and motion.version not in (entry.version, "animatelcm", None):  # of these two the file is not sure
        raise UserError(
            f"{where} is a {motion.version} module, but the entry says `version: {entry.version}`: remove it"
        )
    checked.inference.check_version(MOTION_VERSIONS[checked.version or motion.version or ""])
