"""A prompt config to files: samples, a grid of all, and the resolved config; an interrupted run goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from animatediff.checkpoints.files import file_sha256
from animatediff.config.memory_options import Memory
from animatediff.config.prompt_warnings import prompt_warnings
from animatediff.config.prompt_yaml import RunConfig
from animatediff.config.request import Request
from animatediff.config.spellings import files
from animatediff.features.feature import in_turn
from animatediff.features.inputs import input_sha256, other_speed
from animatediff.media.video import FrameStream, is_complete, read_video, save_video, tile
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.compiled import CompiledUNet
from animatediff.pipeline.device import own_device, pick_dtype
from animatediff.pipeline.finish import Finisher, compare, sound_of
from animatediff.pipeline.fit import as_begun, fitted, parts_of, recorded
from animatediff.pipeline.headers import Checked, check_requests
from animatediff.pipeline.outputs import as_bytes, decode_frames, decode_pixels, one_line_when_full
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.processes import OneProcess
from animatediff.pipeline.prompts import first_text
from animatediff.pipeline.rehearse import rehearse
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

GRID_COLUMNS = 5
NAME_WORDS, NAME_LENGTH = 10, 60


@dataclass(frozen=True)
class Job:
    """One clip to make: what, by which entry, into which file (or folder of PNGs)."""

    entry: int
    request: Request
    path: Path

    @property
    def made(self) -> bool:
        return is_complete(self.path)


@dataclass(frozen=True)
class Batch:
    """Clips of one entry that are sampled together, `memory.batch_size` at most."""

    jobs: tuple[Job, ...]

    @property
    def entry(self) -> int:
        return self.jobs[0].entry

    @property
    def made(self) -> bool:
        return all(job.made for job in self.jobs)


class Follower:
    """What a run tells whoever waits for it; what a method raises ends the run. This one listens to nothing."""

    def loaded(self, pipeline: AnimateDiffPipeline) -> None:
        """The networks of the next clips are there."""

    def stepped(self, done: int, total: int) -> None:
        """A step of a sampler is done, of so many of the whole run."""

    def estimated(self, latents: Tensor) -> None:
        """The clean latents (1, f, c, h, w) of a clip, the first of its batch, that are expected so far."""


def animate(
    config: RunConfig,
    *,
    output_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    compiled: bool = False,
    assembler: Assembler | None = None,
    follower: Follower | None = None,
    processes: OneProcess | None = None,
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
        device: auto, cuda, mps or cpu; of several processes on a machine, each has a GPU of its own.
        dtype: float32, float16 or bfloat16; by default that of an earlier run of the config, or what suits the device.
        compiled: the UNets by torch.compile, which takes a while for each entry and pays for many clips or steps.
        assembler: of earlier runs, with what it has read; on its device and in its dtype.
        follower: is told how far the run is.
        processes: from `launched()`, where torchrun has started several: they share the prompts out among them, or,
            `splitting`, the windows or parts of guidance of every clip.

    Returns:
        The folder. In the first process all is done then; another one has made its last clip.

    Raises:
        UserError: anything wrong with the config, its files or the folder; all that can be known is checked first.
    """
    follower, processes = follower or Follower(), processes or OneProcess()
    target = assembler.device if assembler else own_device(device)
    dtype = dtype or recorded_dtype(config.provenance, target)
    weights_dtype = assembler.dtype if assembler else pick_dtype(dtype, target)
    for entry in config.entries:
        check_control_images(entry)
    for entry in config.entries:
        for line in prompt_warnings(entry.prompts):
            processes.tell_once(f"entry {entry.output.name}: {line}")
    plain = check_requests(with_tagged_loras(config.entries))
    for entry in plain:
        named = "model.motion_module" in entry.request.spelled
        if entry.request.size.num_frames > 1 and not entry.headers.motion and not named:
            alone = "without a motion_module, every frame is a picture of its own: motion_module=FILE animates"
            processes.tell_once(f"entry {entry.request.output.name}: {alone}")
        if (line := other_speed(entry.request)) is not None:
            processes.tell_once(f"entry {entry.request.output.name}: {line}")
    rehearse(plain, loaded_next=True)
    checked = [fitted(entry, target, weights_dtype, processes.tell_once) for entry in plain]
    entries = (recorded(entry.request, fit.request) for entry, fit in zip(plain, checked, strict=True))
    config = replace(config, entries=tuple(entries))  # nothing is left open in them
    for entry in checked if processes.spread else ():
        _check_split(entry.request)
    provenance = made_on(target, weights_dtype) | versions()
    with ExitStack() as held:
        begin = partial(_begin, config, output_dir, provenance, checked, held)
        folder, config, batches = processes.once(begin)
        _check_shared(folder)
        checked = [as_begun(entry, begun) for entry, begun in zip(checked, config.entries, strict=True)]
        assembler = assembler or Assembler(target, weights_dtype)
        _make(config, folder, checked, batches, assembler, follower, processes, compiled=compiled)
    return folder


def _make(
    config: RunConfig,
    folder: Path,
    checked: Sequence[Checked],
    batches: Sequence[Batch],
    assembler: Assembler,
    follower: Follower,
    processes: OneProcess,
    *,
    compiled: bool,
) -> None:
    """Make the clips of all batches, and the grid."""
    jobs, waiting = plan(config, folder), [job for batch in batches for job in batch.jobs]
    if done := len(jobs) - len(waiting):
        processes.tell_once(f"{done} of {len(jobs)} prompts are there already")
    with _progress(checked, jobs, waiting, processes) as bar, _hint_on_interrupt(folder, jobs, processes):
        for index, todo in groupby(processes.take(batches, bar), key=lambda batch: batch.entry):
            entry = checked[index]
            hashes = _hashes(entry)
            record_hashes(config, folder, _by_path(hashes, entry))  # refuses files that have changed meanwhile
            with one_line_when_full(entry.request):
                pipeline = AnimateDiffPipeline(assembler.assemble(entry))
                finisher = _finisher(entry.request, pipeline)
            if compiled:
                pipeline.compile(tell=processes.tell)
            for line in pipeline.model.reports:
                processes.tell_once(line)
            follower.loaded(pipeline)
            bar.unpause()  # loading is no part of a step
            for batch in todo:
                missing = [job for job in batch.jobs if not job.made]
                bar.set_description(f"prompt {jobs.index(missing[0]) + 1}/{len(jobs)}")
                with one_line_when_full(entry.request):
                    _run(pipeline, missing, hashes, bar, finisher, follower, entry.request.memory, processes)
            del pipeline
    grid = folder / ("sample-grid" if config.entries[0].output.format == "png" else f"sample.{_format(config)}")
    if processes.first and len(jobs) > 1 and (waiting or not grid.exists()):
        _write_grid(grid, config, jobs)


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
    words = re.findall(r"\w+", prompt)[:NAME_WORDS]
    while len(words) > 1 and len("-".join(words).encode()) > NAME_LENGTH:
        words.pop()
    return "-".join(words).encode()[:NAME_LENGTH].decode(errors="ignore")


def _begin(
    config: RunConfig,
    output_dir: str | Path | None,
    provenance: Mapping[str, Any],
    checked: list[Checked],
    held: ExitStack,
) -> tuple[Path, RunConfig, list[Batch]]:
    """The folder, its config and the clips that are to be made; the hashes of all their files are in config.yaml."""
    folder, config = open_folder(config, output_dir, provenance, held)
    waiting = [job for job in plan(config, folder) if not job.made]
    for index in sorted({job.entry for job in waiting}):
        config = record_hashes(config, folder, _by_path(_hashes(checked[index]), checked[index]))
    return folder, config, list(_batches(waiting, [entry.request.memory.batch_size for entry in checked]))


def _batches(jobs: Sequence[Job], sizes: Sequence[int]) -> Iterator[Batch]:
    """Jobs that follow each other, as many as the size of their entry's batches."""
    for index, todo in groupby(jobs, key=lambda job: job.entry):
        own = tuple(todo)
        yield from (Batch(own[start : start + sizes[index]]) for start in range(0, len(own), sizes[index]))


def _together(jobs: Sequence[Job]) -> Request:
    """One request of the clips of a batch, which differ in prompt, negative prompt and seed alone."""
    first, requests = jobs[0].request, [job.request for job in jobs]
    prompts = replace(
        first.prompts,
        prompt=tuple(r.prompts.prompt[0] for r in requests),
        negative_prompt=tuple(text for r in requests for text in r.prompts.negative_prompt),
    )
    return replace(
        first, prompts=prompts, sampling=replace(first.sampling, seed=tuple(r.sampling.seed[0] for r in requests))
    )


def _check_shared(folder: Path) -> None:
    """Raises: UserError on a machine that does not see the folder that the first process has begun."""
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"got the folder {folder}, which the first process has begun and this machine does not see, expected one "
            "that all machines share: choose another --output-dir"
        )


def _check_split(request: Request) -> None:
    """Raises: UserError where a step is one task, which processes cannot share."""
    if not request.windows and parts_of(request) == 1:
        raise UserError(
            f"entry {request.output.name}: got --split-clips for clips without windows and guidance, expected one of "
            "them: set windows=open, or leave --split-clips out"
        )


def _finisher(request: Request, pipeline: AnimateDiffPipeline) -> Finisher | None:
    if not request.finish.changes:
        return None
    return Finisher(request.finish, device=pipeline.device, downsampling=pipeline.vae.config.downsampling)


def _run(
    pipeline: AnimateDiffPipeline,
    jobs: Sequence[Job],
    hashes: dict[str, str],
    bar: tqdm,
    finisher: Finisher | None,
    follower: Follower,
    memory: Memory,
    processes: OneProcess,
) -> None:
    """Make clips together, and write one after the other, frame by frame, or, where it is finished, as a whole."""
    r, watch = replace(_together(jobs), memory=memory), Stopwatch(pipeline.device)

    def told(clips: int) -> dict[str, Any]:
        def after_step(*_: object) -> None:
            done = processes.stepped(bar, clips)
            watch.step()
            follower.stepped(done, int(bar.total))

        return {"callback": after_step, "estimated": lambda x: follower.estimated(x[:1])}

    sampled = pipeline.sample(r, spread=processes.spread or in_turn, **told(len(jobs)))
    if processes.spread and not processes.first:
        return
    for job, latents in zip(jobs, sampled.split(1), strict=True):
        if finisher is None:
            clip: FrameStream | Tensor = FrameStream(
                latents.shape[1], decode_frames(pipeline.vae, latents, chunk=memory.vae_frames)
            )
        else:
            before = as_bytes(decode_pixels(pipeline.vae, latents, chunk_frames=memory.vae_frames))
            alone = replace(job.request, memory=memory)
            clip = pipeline.finish(before, alone, finisher=finisher, **told(1))[0]
            processes.tell(f"finished: {compare(before[0], clip)}")
        metadata = clip_settings(job.request, hashes) | made_on(pipeline.device, pipeline.dtype)
        save_video(clip, job.path, r.written_fps, metadata, loop=r.output.loop_count, sound=sound_of(r))
        processes.tell(str(job.path), sys.stdout)
    if finisher is None and not processes.spread and not isinstance(pipeline.unet.forward, CompiledUNet):
        remember(r, watch, pipeline.dtype)


def _hashes(checked: Checked) -> dict[str, str]:
    """SHA-256 of every file of a request, by option."""
    weights = {option for option, file in files(checked.request).items() if file.kind.kinds}
    return {
        option: file_sha256(path) if option in weights else input_sha256(path)
        for option, path in checked.headers.paths.items()
    }


def _by_path(hashes: Mapping[str, str], checked: Checked) -> dict[str, str]:
    return {str(checked.headers.paths[option]): sha256 for option, sha256 in hashes.items()}


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


@contextmanager
def _progress(checked: list[Checked], jobs: list[Job], waiting: list[Job], processes: OneProcess) -> Iterator[tqdm]:
    """One bar for all steps of all prompts that are to be done."""
    total = sum(checked[job.entry].steps for job in waiting)
    first = jobs.index(waiting[0]) + 1 if waiting else len(jobs)
    description = f"prompt {first}/{len(jobs)}"
    hidden = not (waiting and processes.first)
    with tqdm(total=total, desc=description, unit="step", file=sys.stderr, disable=hidden) as bar:
        yield bar


@contextmanager
def _hint_on_interrupt(folder: Path, jobs: list[Job], processes: OneProcess) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        done = sum(job.made for job in jobs)
        again = f"to go on, repeat the command with --output-dir {folder}"
        processes.tell_once(f"{done} of {len(jobs)} prompts are done; {again}")
        raise
