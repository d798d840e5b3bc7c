"""A prompt config to files: samples, a grid of all, and the resolved config; an interrupted run goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from animatediff.checkpoints.files import file_sha256
from animatediff.config.memory_options import Memory
from animatediff.config.prompt_warnings import prompt_warnings
from animatediff.config.prompt_yaml import RunConfig
from animatediff.config.request import Request
from animatediff.config.spellings import files
from animatediff.features.inputs import input_sha256
from animatediff.media.video import FrameStream, is_complete, read_video, save_video, tile
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.device import pick_device, pick_dtype
from animatediff.pipeline.finish import Finisher, compare, sound_of
from animatediff.pipeline.fit import as_begun, fitted, recorded
from animatediff.pipeline.headers import Checked, check_requests
from animatediff.pipeline.outputs import as_bytes, decode_frames, decode_pixels, one_line_when_full
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.prompts import first_text
from animatediff.pipeline.run_folder import (
    clip_settings,
    made_on,
    open_folder,
    record_hashes,
    recorded_dtype,
    versions,
)
from animatediff.pipeline.tagged_loras import with_tagged_loras
from animatediff.pipeline.timings import Stopwatch, remember
from animatediff.utils import UserError, printable

GRID_COLUMNS = 4
NAME_WORDS, NAME_LENGTH = 10, 60


@dataclass(frozen=True)
class Job:
    """One clip to make: what, by which entry, into which file (or folder of PNGs)."""

    entry: int
    request: Request
    path: Path


class Follower:
    """What a run tells whoever waits for it; what a method raises ends the run. This one listens to nothing."""

    def loaded(self, pipeline: AnimateDiffPipeline) -> None:
        """The networks of the next clips are there."""

    def stepped(self, done: int, total: int) -> None:
        """A step of a sampler is done, of so many of the whole run."""

    def estimated(self, latents: Tensor) -> None:
        """The clean latents (1, f, c, h, w) that are expected so far."""


def animate(
    config: RunConfig,
    *,
    output_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    assembler: Assembler | None = None,
    follower: Follower | None = None,
) -> Path:
    """Animate every prompt of a config.

    The folder gets `sample/<index>-<words>.<format>` for each prompt, `sample.<format>` (for png the folder
    `sample-grid/`) with all of them side by side where there are several, and `config.yaml`: what was run, with the
    seeds that were drawn, the hashes of all files and the versions. Files appear whole or not at all; progress goes to
    stderr and finished paths to stdout.

    Args:
        config: from `load_config`.
        output_dir: by default a new `samples/<config>-<time>/`. The folder of an earlier run of the same config is
            taken up where it stopped.
        device: auto, cuda, mps or cpu.
        dtype: float32, float16 or bfloat16; by default that of an earlier run of the config, or what suits the device.
        assembler: of earlier runs, with what it has read; on its device and in its dtype.
        follower: is told how far the run is.

    Returns:
        The folder.

    Raises:
        UserError: anything wrong with the config, its files or the folder; all that can be known is checked first.
    """
    follower = follower or Follower()
    target = assembler.device if assembler else pick_device(device)
    dtype = dtype or recorded_dtype(config.provenance, target)
    weights_dtype = assembler.dtype if assembler else pick_dtype(dtype, target)
    for entry in config.entries:
        check_control_images(entry)
    for entry in config.entries:
        for line in prompt_warnings(entry.prompts):
            _say(f"entry {entry.output.name}: {line}")
    plain = check_requests(with_tagged_loras(config.entries))
    checked = [fitted(entry, target, weights_dtype, _say) for entry in plain]
    entries = (recorded(entry.request, fit.request) for entry, fit in zip(plain, checked, strict=True))
    config = replace(config, entries=tuple(entries))  # nothing is left open in them
    provenance = made_on(target, weights_dtype) | versions()
    folder, config = open_folder(config, output_dir, provenance)
    checked = [as_begun(entry, begun) for entry, begun in zip(checked, config.entries, strict=True)]
    jobs = plan(config, folder)
    waiting = [job for job in jobs if not is_complete(job.path)]
    if done := len(jobs) - len(waiting):
        _say(f"{done} of {len(jobs)} prompts are there already")
    with _progress(checked, jobs, waiting) as bar, _hint_on_interrupt(folder, jobs):
        assembler = assembler or Assembler(target, weights_dtype)
        for index, entry in enumerate(checked):
            todo = [job for job in waiting if job.entry == index]
            if not todo:
                continue
            hashes = _hashes(entry)
            paths = entry.headers.paths
            config = record_hashes(config, folder, {str(paths[option]): h for option, h in hashes.items()})
            with one_line_when_full(entry.request):
                pipeline = AnimateDiffPipeline(assembler.assemble(entry))
                finisher = _finisher(entry.request, pipeline)
            for line in pipeline.model.reports:
                _say(line)
            follower.loaded(pipeline)
            bar.unpause()  # loading is no part of a step
            for job in todo:
                bar.set_description(f"prompt {jobs.index(job) + 1}/{len(jobs)}")
                with one_line_when_full(entry.request):
                    _run(pipeline, job, hashes, bar, finisher, follower, entry.request.memory)
            del pipeline
    grid = folder / ("sample-grid" if config.entries[0].output.format == "png" else f"sample.{_format(config)}")
    if len(jobs) > 1 and (waiting or not grid.exists()):
        _write_grid(grid, config, jobs)
    return folder


def check_control_images(entry: Request) -> None:
    """Raises: UserError for a SparseCtrl encoder without pictures, which only a call may give it later."""
    if entry.sparsectrl.path and not len(entry.sparsectrl.images):
        raise UserError(
            f"entry {entry.output.name}: got controlnet_path without controlnet_images, expected images of some "
            "frames: add them"
        )


def plan(config: RunConfig, folder: Path) -> list[Job]:
    """All clips of a config whose seeds are drawn, numbered through its entries."""
    jobs = []
    for index, entry in enumerate(config.entries):
        ending = "" if entry.output.format == "png" else f".{entry.output.format}"
        for prompt, negative, seed in entry.per_prompt():
            name = f"{len(jobs)}-{file_words(first_text(prompt))}".rstrip("-")
            negatives = (negative,) if entry.prompts.negative_prompt else ()
            prompts = replace(
                entry.prompts, prompt=(prompt,), negative_prompt=negatives, head_prompt="", tail_prompt=""
            )
            sampling = replace(entry.sampling, seed=(seed,), random_seed=())
            request = replace(entry, prompts=prompts, sampling=sampling)
            jobs.append(Job(index, request, folder / "sample" / f"{name}{ending}"))
    return jobs


def file_words(prompt: str) -> str:
    """The first words of a prompt, safe in a file name of any system: letters, digits and `_`, joined by `-`."""
    return "-".join(re.findall(r"\w+", prompt)[:NAME_WORDS]).encode()[:NAME_LENGTH].decode(errors="ignore").rstrip("-")


def _finisher(request: Request, pipeline: AnimateDiffPipeline) -> Finisher | None:
    if not request.finish.changes:
        return None
    return Finisher(request.finish, device=pipeline.device, downsampling=pipeline.vae.config.downsampling)


def _run(
    pipeline: AnimateDiffPipeline,
    job: Job,
    hashes: dict[str, str],
    bar: tqdm,
    finisher: Finisher | None,
    follower: Follower,
    memory: Memory,
) -> None:
    """Make one clip and write it, frame by frame, or, where it is finished, as a whole."""
    r, watch = replace(job.request, memory=memory), Stopwatch(pipeline.device)

    def after_step(*_: object) -> None:
        bar.update()
        watch.step()
        follower.stepped(int(bar.n), int(bar.total))

    told = {"callback": after_step, "estimated": follower.estimated}
    latents = pipeline.sample(r, **told)
    if finisher is None:
        clip: FrameStream | Tensor = FrameStream(
            latents.shape[1], decode_frames(pipeline.vae, latents, chunk=memory.vae_frames)
        )
    else:
        before = as_bytes(decode_pixels(pipeline.vae, latents, chunk_frames=memory.vae_frames))
        clip = pipeline.finish(before, r, finisher=finisher, **told)[0]
        _say(f"finished: {compare(before[0], clip)}")
    metadata = clip_settings(job.request, hashes) | made_on(pipeline.device, pipeline.dtype)
    save_video(clip, job.path, r.written_fps, metadata, loop=r.output.loop_count, sound=sound_of(r))
    if finisher is None:
        remember(r, watch, pipeline.dtype)
    with tqdm.external_write_mode(file=sys.stdout):
        print(printable(str(job.path)), flush=True)


def _hashes(checked: Checked) -> dict[str, str]:
    """SHA-256 of every file of a request, by option."""
    weights = {option for option, file in files(checked.request).items() if file.kind.kinds}
    return {
        option: file_sha256(path) if option in weights else input_sha256(path)
        for option, path in checked.headers.paths.items()
    }


def _format(config: RunConfig) -> str:
    return config.entries[0].output.format


def _write_grid(path: Path, config: RunConfig, jobs: list[Job]) -> None:
    """All clips side by side, in the first entry's format and speed.

    They are read back, so that a run that is taken up ends with the same grid.
    """
    videos = [read_video(job.path)[0].numpy() for job in jobs]
    prompts = [job.request.prompts.prompt[0] for job in jobs]
    first = config.entries[0]
    grid = tile(videos, GRID_COLUMNS)
    save_video(grid, path, first.written_fps, metadata={"prompts": prompts}, loop=first.output.loop_count)
    print(printable(str(path)))


# ---- what the user sees ---------------------------------------------------------------------------------------


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


@contextmanager
def _progress(checked: list[Checked], jobs: list[Job], waiting: list[Job]) -> Iterator[tqdm]:
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
        done = sum(is_complete(job.path) for job in jobs)
        _say(f"{done} of {len(jobs)} prompts are done; to go on, repeat the command with --output-dir {folder}")
        raise
