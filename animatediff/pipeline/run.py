"""A prompt config to files: samples, a grid of all, and the resolved config; an interrupted run goes on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import animatediff
from animatediff.checkpoints.files import file_sha256
from animatediff.config.prompt_yaml import AnimateEntry, Prompt, RunConfig, dump_config, load_config
from animatediff.features.sparsectrl import read_condition_images
from animatediff.media.video import STREAMED, FrameStream, read_video, save_video, tile
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.model import draw_seed, pick_device, pick_dtype, seeded
from animatediff.pipeline.pipeline import AnimateDiffPipeline, advance
from animatediff.pipeline.prompts import first_text
from animatediff.pipeline.start import INPUTS, SETTINGS, input_sha256, read_inputs
from animatediff.pipeline.weights import CheckedEntry, check_entries
from animatediff.utils import UserError, replacing

GRID_COLUMNS = 4
NAME_WORDS, NAME_LENGTH = 10, 60


@dataclass(frozen=True)
class Job:
    """One clip to make: what, by which entry, into which file (or folder of PNGs)."""

    entry: int
    prompt: Prompt
    negative_prompt: Prompt
    seed: int
    path: Path


def animate(
    config: RunConfig, *, output_dir: str | Path | None = None, device: str = "auto", dtype: str | None = None
) -> Path:
    """Animate every prompt of a config.

    The folder gets `sample/<index>-<words>.<format>` for each prompt, `sample.<format>` (for png the folder
    `sample-grid/`) with all of them side by side, and `config.yaml`: what was run, with the seeds that were drawn,
    the hashes of all weight files and the versions. Files appear whole or not at all; progress goes to stderr and
    finished paths to stdout.

    Args:
        config: from `load_config`.
        output_dir: by default a new `samples/<config>-<time>/`. The folder of an earlier run of the same config is
            taken up where it stopped.
        device: auto, cuda, mps or cpu.
        dtype: float32, float16 or bfloat16; by default what suits the device.

    Returns:
        The folder.

    Raises:
        UserError: anything wrong with the config, its files or the folder; all that can be known is checked first.
    """
    target = pick_device(device)
    weights_dtype = pick_dtype(dtype, target)
    for entry in config.entries:
        if entry.controlnet_path and not entry.controlnet_images:
            raise UserError(
                f"entry {entry.name}: got controlnet_path without controlnet_images, expected images of some frames: "
                "add them"
            )
    checked = check_entries(config.entries)
    config = replace(config, entries=tuple(entry.entry for entry in checked))  # nothing is left open in them
    provenance = {"device": str(target), "dtype": str(weights_dtype).removeprefix("torch."), **_versions()}
    folder, config = _open_folder(config, output_dir, provenance)
    jobs = plan(config, folder)
    waiting = [job for job in jobs if not job.path.exists()]
    if done := len(jobs) - len(waiting):
        _say(f"{done} of {len(jobs)} prompts are there already")
    clips: dict[Path, np.ndarray] = {}
    with _progress(checked, jobs, waiting) as bar, _hint_on_interrupt(folder, jobs):
        assembler = Assembler(target, weights_dtype)
        for index, entry in enumerate(checked):
            todo = [job for job in waiting if job.entry == index]
            if not todo:
                continue
            hashes = {
                str(path): input_sha256(path) if key in INPUTS else file_sha256(path)
                for key, path in entry.files.items()
            }
            config = _record_hashes(config, folder, hashes)
            components = assembler.assemble(entry)
            for line in components.reports:
                _say(line)
            pipeline = AnimateDiffPipeline(components)
            bar.unpause()  # loading is no part of a step
            for job in todo:
                bar.set_description(f"prompt {jobs.index(job) + 1}/{len(jobs)}")
                if (frames := _run(pipeline, entry, job, hashes, bar)) is not None:
                    clips[job.path] = frames
            del pipeline, components
    grid = folder / ("sample-grid" if config.entries[0].format == "png" else f"sample.{config.entries[0].format}")
    if waiting or not grid.exists():
        _write_grid(grid, config, jobs, clips)
    return folder


def plan(config: RunConfig, folder: Path) -> list[Job]:
    """All clips of a config whose seeds are drawn, numbered through its entries."""
    jobs = []
    for index, entry in enumerate(config.entries):
        ending = "" if entry.format == "png" else f".{entry.format}"
        for prompt, negative_prompt, seed in entry.per_prompt():
            name = f"{len(jobs)}-{file_words(first_text(prompt))}".rstrip("-")
            jobs.append(Job(index, prompt, negative_prompt, seed, folder / "sample" / f"{name}{ending}"))
    return jobs


def file_words(prompt: str) -> str:
    """The first words of a prompt, safe in a file name of any system: letters, digits and `_`, joined by `-`."""
    return "-".join(re.findall(r"\w+", prompt)[:NAME_WORDS]).encode()[:NAME_LENGTH].decode(errors="ignore").rstrip("-")


def _run(
    pipeline: AnimateDiffPipeline, checked: CheckedEntry, job: Job, hashes: dict[str, str], bar: tqdm
) -> np.ndarray | None:
    """Make one clip and write it; returns its frames, uint8 (f, H, W, 3), where they are not written as a stream."""
    entry, sampling = checked.entry, checked.sampling
    try:
        (latents,) = pipeline(
            job.prompt,
            entry.L,
            entry.H,
            entry.W,
            sampling.steps,
            sampling.guidance_scale,
            job.negative_prompt,
            eta=sampling.eta,
            generator=seeded(job.seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=advance(bar),
            sampler=sampling.sampler,
            timestep_spacing=sampling.timestep_spacing,
            timesteps=sampling.timesteps,
            **_condition(checked),
            **read_inputs(checked.files, frames=entry.L, extend=entry.extend),
            **{key: getattr(entry, key) for key in (*SETTINGS, "inversion_prompt")},
        )
        stream = pipeline.decode_frames(latents)
        frames = None if job.path.suffix in STREAMED else np.stack(list(stream))
        clip = FrameStream(latents.shape[2], stream) if frames is None else frames
        save_video(clip, job.path, entry.fps, metadata=_settings(checked, job, hashes))
    except torch.OutOfMemoryError:
        raise UserError(
            f"entry {entry.name}: got {entry.L} frames of {entry.H}x{entry.W}, more than the device's memory can take: "
            "choose smaller L, H or W, or --dtype float16"
        ) from None
    with tqdm.external_write_mode(file=sys.stdout):
        print(job.path, flush=True)
    return frames


def _condition(checked: CheckedEntry) -> dict[str, Any]:
    """Arguments of the pipeline for the images of an entry."""
    entry = checked.entry
    if not entry.controlnet_images:
        return {}
    files = [checked.files[f"controlnet_images[{i}]"] for i in range(len(entry.controlnet_images))]
    images = read_condition_images(files, (entry.H, entry.W), normalize=entry.normalize_condition_images)
    return {
        "conditioning_frames": images,
        "controlnet_frame_indices": entry.controlnet_image_indexs,
        "controlnet_conditioning_scale": entry.controlnet_scale,
    }


def _settings(checked: CheckedEntry, job: Job, hashes: dict[str, str]) -> dict[str, Any]:
    """What made a clip, for the clip's own file."""
    entry = checked.entry
    settings: dict[str, Any] = {"prompt": job.prompt, "negative_prompt": job.negative_prompt, "seed": job.seed}
    settings |= {key: value for key, value in asdict(checked.sampling).items() if value != ()}
    settings |= {key: getattr(entry, key) for key in ("L", "H", "W")}
    if checked.windows:
        settings |= {f"window_{key}": value for key, value in asdict(checked.windows).items()}
    settings |= {key: asdict(value) if is_dataclass(value) else value for key, value in entry.said().items()}
    images = {key: path for key, path in entry.other_paths().items() if key.startswith("controlnet_images")}
    if isinstance(job.prompt, dict) or isinstance(job.negative_prompt, dict):
        travel = {"loop": checked.windows is not None and checked.windows.loops} | {
            key: value for key, value in asdict(checked.travel).items() if value is not None
        }
        settings |= {f"prompt_{key}": value for key, value in travel.items()}
    for key in ("prompt_weighting", "clip_skip"):
        if (value := getattr(entry, key)) != getattr(AnimateEntry, key):
            settings[key] = value
    if inputs := entry.input_paths():
        settings |= {key: getattr(entry, key) for key in (*SETTINGS, "inversion_prompt")}
    for key, path in (inputs | images | entry.weight_paths()).items():
        settings[key] = {"path": path, "sha256": hashes[str(checked.files[key])]}
    if entry.lora_model_path:
        settings |= {"lora_alpha": entry.lora_alpha, "lora_alpha_rule": entry.lora_alpha_rule}
    if entry.adapter_lora_path:
        settings["adapter_lora_scale"] = entry.adapter_lora_scale
    if entry.motion_module_lora_configs:
        settings["motion_lora_alphas"] = [lora.alpha for lora in entry.motion_module_lora_configs]
    if images:
        keys = ("controlnet_image_indexs", "controlnet_scale", "normalize_condition_images")
        settings |= {key: getattr(entry, key) for key in keys}
    if entry.embeddings:
        settings["embedding_names"] = [embedding.name for embedding in entry.embeddings]
    return settings | {"animatediff": animatediff.__version__}


def _write_grid(path: Path, config: RunConfig, jobs: list[Job], clips: dict[Path, np.ndarray]) -> None:
    """All clips side by side, in the first entry's format and speed; a single clip is copied.

    Clips of an earlier start, and those written as a stream, are read back.
    """
    if len(jobs) == 1:
        with replacing(path) as temporary:
            (shutil.copytree if jobs[0].path.is_dir() else shutil.copyfile)(jobs[0].path, temporary)
        print(path)
        return
    videos = [clips[job.path] if job.path in clips else read_video(job.path)[0].numpy() for job in jobs]
    save_video(
        tile(videos, GRID_COLUMNS), path, config.entries[0].fps, metadata={"prompts": [job.prompt for job in jobs]}
    )
    print(path)


# ---- the folder of a run --------------------------------------------------------------------------------------


def _open_folder(
    config: RunConfig, output_dir: str | Path | None, provenance: dict[str, Any]
) -> tuple[Path, RunConfig]:
    """The folder to write to and the config with all seeds drawn, new or as the folder's own config.yaml has them."""
    if output_dir is None:
        folder = _new_folder(config.name)
    else:
        folder = Path(output_dir)
        if (folder / "config.yaml").is_file():
            return folder, _resume(config, folder, provenance)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"got --output-dir {folder}, which holds no config.yaml, expected a new or empty folder or that of an "
                "unfinished run: choose another"
            )
        _make_folder(folder, exist_ok=True)
    entries = tuple(_draw_seeds(entry) for entry in config.entries)
    config = RunConfig(config.name, entries, provenance)
    _write_config(folder, config)
    return folder, config


def _new_folder(name: str) -> Path:
    time = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in range(1, 1000):
        folder = Path("samples") / (f"{name}-{time}" if attempt == 1 else f"{name}-{time}-{attempt}")
        try:
            _make_folder(folder)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"got a thousand folders samples/{name}-{time}*, expected a free name: give --output-dir")


def _make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --output-dir") from None


def _draw_seeds(entry: AnimateEntry) -> AnimateEntry:
    """The entry with every prompt's seed in `random_seed`, those drawn now and those given."""
    seeds = tuple(draw_seed() if seed == -1 else seed for *_, seed in entry.per_prompt())
    return replace(entry, random_seed=seeds)


def _resume(config: RunConfig, folder: Path, provenance: dict[str, Any]) -> RunConfig:
    """The config that the folder was made with, if it is this one."""
    old = load_config(folder / "config.yaml")
    advice = "repeat the run with the same settings, or choose another --output-dir"
    if len(old.entries) != len(config.entries):
        raise UserError(f"got {len(config.entries)} entries, but {folder} was made with {len(old.entries)}: {advice}")
    for a, b in zip(old.entries, config.entries, strict=True):
        before, now = asdict(a), asdict(b)
        for key in before:
            same = before[key] == now[key] or (key == "random_seed" and not now[key])
            if not same:
                raise UserError(
                    f"entry {b.name}: {key}: got {now[key]!r}, but {folder} was made with {before[key]!r}: {advice}"
                )
    if (dtype := old.provenance.get("dtype")) != provenance["dtype"]:
        raise UserError(f"got dtype {provenance['dtype']}, but {folder} was made with {dtype}: {advice}")
    return old


def _record_hashes(config: RunConfig, folder: Path, hashes: dict[str, str]) -> RunConfig:
    """Add the hashes of an entry's files to the folder's config.yaml.

    Raises:
        UserError: a file is another than the run began with.
    """
    known = config.provenance.get("weights") or {}
    for path, sha256 in hashes.items():
        if known.get(path, sha256) != sha256:
            raise UserError(f"got {path}, which has changed since {folder} was begun: choose another --output-dir")
    config = replace(config, provenance=config.provenance | {"weights": known | hashes})
    _write_config(folder, config)
    return config


def _write_config(folder: Path, config: RunConfig) -> None:
    temporary = folder / f".config.{os.getpid()}.tmp"
    temporary.write_text(dump_config(config), encoding="utf-8")
    os.replace(temporary, folder / "config.yaml")


def _versions() -> dict[str, str]:
    return {
        "animatediff": animatediff.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


# ---- what the user sees ---------------------------------------------------------------------------------------


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


@contextmanager
def _progress(checked: list[CheckedEntry], jobs: list[Job], waiting: list[Job]) -> Iterator[tqdm]:
    """One bar for all steps of all prompts that are to be done."""
    total = sum(checked[job.entry].steps for job in waiting)
    first = jobs.index(waiting[0]) + 1 if waiting else len(jobs)
    description = f"prompt {first}/{len(jobs)}"
    with tqdm(total=total, desc=description, unit="step", file=sys.stderr, disable=not waiting) as bar:
        yield bar


@contextmanager
def _hint_on_interrupt(folder: Path, jobs: list[Job]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        done = sum(job.path.exists() for job in jobs)
        _say(f"{done} of {len(jobs)} prompts are done; to go on, repeat the command with --output-dir {folder}")
        raise
