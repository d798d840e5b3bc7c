"""Are the weight files of a run there, and are they what their keys say? Asked before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import animatediff
from animatediff.checkpoints.identify import FileInfo, identify, refusal
from animatediff.checkpoints.sizes import trained_frames
from animatediff.config import AnimateEntry
from animatediff.diffusion.schedule import NoiseSchedule
from animatediff.inference_config import InferenceConfig, load_inference_config
from animatediff.model_config import MOTION_VERSIONS
from animatediff.utils import UserError, naming

REPOSITORY = Path(animatediff.__file__).resolve().parents[1]

# key of a prompt config -> (what belongs there, the kinds of file that are it)
EXPECTED = {
    "pretrained_model_path": ("an SD 1.x image model", ("sd1-checkpoint", "diffusers-folder")),
    "motion_module": ("a motion module", ("motion-module", "motion-adapter")),
    "dreambooth_path": ("an SD 1.x image model", ("sd1-checkpoint", "diffusers-folder")),
    "lora_model_path": ("a LoRA of an image model", ("lora",)),
    "adapter_lora_path": ("a domain adapter", ("domain-adapter", "lora")),
    "motion_module_lora_configs": ("a MotionLoRA", ("motion-lora",)),
}

MOTION_FILES = "https://huggingface.co/guoyww/animatediff"
IMAGE_MODELS = "https://huggingface.co/guoyww/animatediff_t2i_backups"
SD15 = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
# where a file of this name is published
SOURCES = {
    **dict.fromkeys(("mm_sd_v14.ckpt", "mm_sd_v15.ckpt", "mm_sd_v15_v2.ckpt", "v3_sd15_mm.ckpt"), MOTION_FILES),
    **dict.fromkeys(("v3_sd15_adapter.ckpt",), MOTION_FILES),
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
    "stable-diffusion-v1-5": SD15,
    "v1-5-pruned-emaonly.safetensors": SD15,
    "v1-5-pruned.safetensors": SD15,
}


@dataclass(frozen=True)
class CheckedEntry:
    """An entry whose files are all there: their places by key, and what the motion module is."""

    entry: AnimateEntry
    files: dict[str, Path]
    inference: InferenceConfig
    motion: FileInfo | None

    @property
    def version(self) -> str | None:
        """The version to load the motion module as, where its file does not tell; None leaves it to the file."""
        if self.entry.version:
            return self.entry.version
        undecided = self.motion is not None and self.motion.version is None
        return self.inference.version or None if undecided else None

    @property
    def max_frames(self) -> int | None:
        """The longest clip its motion module takes; None without one."""
        if self.motion is None:
            return None
        trained = trained_frames(
            self.motion.metadata,
            length=self.motion.positional_length,
            version=self.version or self.motion.version or "",
        )
        asked = self.inference.unet and self.inference.unet.motion_module_kwargs.temporal_position_encoding_max_len
        return max(trained, self.entry.max_frames, asked or 0)


def check_entries(entries: Iterable[AnimateEntry]) -> list[CheckedEntry]:
    """Look at every file of every entry, without loading any.

    Raises:
        UserError: a file is missing, broken, or something else than its key says; the motion module contradicts the
            inference config or was not trained for as many frames; SparseCtrl is asked for.
    """
    entries = list(entries)
    for entry in entries:
        if entry.controlnet_path:
            raise UserError(
                f"entry {entry.name}: SparseCtrl is not available yet: remove the controlnet_ keys to animate without"
            )
    found = [_find_all(entry) for entry in entries]  # every file of every entry, before the first is opened
    infos: dict[Path, FileInfo] = {}
    for entry, files in zip(entries, found, strict=True):
        for key, path in files.items():
            if key != "inference_config" and path not in infos:
                with naming(f"entry {entry.name}: {key}"):
                    infos[path] = identify(path)
    return [_check(entry, files, infos) for entry, files in zip(entries, found, strict=True)]


def find_file(path: str) -> Path | None:
    """An existing file or folder: as given (from the current folder), or from the repository's root."""
    candidates = (Path(path).expanduser(), REPOSITORY / path)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _find_all(entry: AnimateEntry) -> dict[str, Path]:
    paths = entry.weight_paths()
    if entry.inference_config:
        paths["inference_config"] = entry.inference_config
    files = {}
    for key, path in paths.items():
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
    checked = CheckedEntry(entry, files, inference, motion)
    schedule = inference.build_schedule()
    with naming(inference.path):
        NoiseSchedule(schedule)
    if entry.steps > (most := schedule.num_train_timesteps):
        raise UserError(f"entry {entry.name}: steps: got {entry.steps}, expected at most {most}")
    if motion is not None:
        _check_motion(checked)
    return checked


def _check_motion(checked: CheckedEntry) -> None:
    entry, motion = checked.entry, checked.motion
    assert motion is not None
    where = f"entry {entry.name}: motion_module: {motion.path}"
    if motion.version is None and checked.version is None:
        raise UserError(
            f"{where}: v1 and v3 modules look the same without their positional encoding: add `version: v1` or "
            "`version: v3` to the entry"
        )
    if entry.version and motion.version not in (entry.version, "animatelcm", None):  # of these two the file is not sure
        raise UserError(
            f"{where} is a {motion.version} module, but the entry says `version: {entry.version}`: remove it"
        )
    checked.inference.check_version(MOTION_VERSIONS[checked.version or motion.version or ""])
    with naming(where):
        longest = checked.max_frames
    if longest is not None and entry.L > longest:
        raise UserError(
            f"entry {entry.name}: L: got {entry.L} frames, expected at most {longest}, the longest clip "
            f"{motion.path.name} was trained on: use L={longest}, or max_frames={entry.L} at your own risk"
        )
