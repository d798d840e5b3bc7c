"""A job of the page to a clip, as the command line makes it: tells how far it is, stops when it is called off."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from animatediff.checkpoints.tiny_decoder_files import find_tiny_decoder, load_tiny_decoder
from animatediff.config.prompt_yaml import RunConfig, load_config
from animatediff.config.spellings import build_request
from animatediff.media.video import is_complete
from animatediff.models.tiny_decoder import TinyDecoder
from animatediff.page.jobs import Job, Journal
from animatediff.page.preview import LatentPreview, animated, is_small
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import Follower, animate, plan
from animatediff.pipeline.run_folder import new_folder
from animatediff.utils import UserError, is_out_of_memory

NAME = "page"  # how the folders of its clips begin
PREVIEW_SECONDS, PREVIEW_SHARE = 1.0, 0.1  # at most one preview in so many seconds, and in so much of the time


class Maker:
    """Makes one clip after the other; the image model stays loaded.

    Args:
        output: the folder that gets `page-<time>/` for each clip.
        journal: is told which folder a job has begun.
        assembler: loads the networks, on its device.
        decoders: folder of tiny decoders for previews (TAESD).
    """

    def __init__(self, output: Path, journal: Journal, assembler: Assembler, decoders: Path):
        self.output, self.journal, self.assembler, self.decoders = output, journal, assembler, decoders

    def __call__(self, job: Job) -> str:
        """The clip's path. A job that was begun before goes on in its folder, if that may be: not with another dtype,
        nor where another program is at work in it.
        """
        request = build_request(job.settings, where="")
        config = RunConfig(NAME, (replace(request, output=replace(request.output, name="1")),))
        begun = Path(job.note) if job.note else None
        if begun and (begun / "config.yaml").is_file():
            with suppress(UserError):
                return self._make(job, config, begun)
        folder = new_folder(NAME, self.output)
        try:
            return self._make(job, config, folder)
        except UserError:
            _remove_empty(folder)
            raise

    def _make(self, job: Job, config: RunConfig, folder: Path) -> str:
        job.note, job.message = str(folder), "Loading the model"
        self.journal.write(job)
        follower = JobFollower(job, config.entries[0].output.fps, self.decoders)
        try:
            animate(config, output_dir=folder, assembler=self.assembler, follower=follower)
        except UserError:
            raise
        except BaseException:  # it was called off, say
            _remove_empty(folder)
            raise
        finally:
            follower.leave()
        (clip,) = (planned.path for planned in plan(load_config(folder / "config.yaml"), folder))
        return str(clip)


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a clip that was not made."""
    if not any(is_complete(file) for file in folder.glob("sample/*")):
        (folder / "config.yaml").unlink(missing_ok=True)
        for empty in (folder / "sample", folder):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


class JobFollower(Follower):
    """Tells a job how far its clip is, and the clip's networks that nobody waits for it any more."""

    def __init__(self, job: Job, fps: float, decoders: Path):
        self.job, self.fps, self.decoders = job, fps, decoders
        self._hooks = []
        self.preview: LatentPreview | None = None
        self._next = 0.0

    def loaded(self, pipeline: AnimateDiffPipeline) -> None:
        def check(*_: object) -> None:
            self.job.check()

        vae = pipeline.vae
        self._hooks = [m.register_forward_pre_hook(check) for m in (pipeline.unet, vae.encoder, vae.decoder)]
        small = is_small(vae)
        self.preview = LatentPreview(vae, small=small, tiny=None if small else self._tiny_decoder(pipeline))
        self.job.message = ""
        self.job.sampling_since = time.monotonic()

    def _tiny_decoder(self, pipeline: AnimateDiffPipeline) -> TinyDecoder | None:
        path = find_tiny_decoder(self.decoders, sdxl=bool(pipeline.unet.config.added_channels))
        try:
            return load_tiny_decoder(path).to(pipeline.device) if path else None
        except UserError as error:  # a clip with a coarser preview is better than none
            print(error, file=sys.stderr)
            return None

    def leave(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def stepped(self, done: int, total: int) -> None:
        self.job.step(done, total)
        if done >= total:
            self.job.message = "Decoding and writing"

    def estimated(self, latents: Tensor) -> None:
        now = time.monotonic()
        if self.preview is None or now < self._next or not bool(latents.isfinite().all()):
            return
        try:
            self.job.preview = animated(self.preview.frames(latents), self.fps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.preview = None  # a clip without a preview is better than none
            return
        took = time.monotonic() - now
        self._next = now + max(PREVIEW_SECONDS, took / PREVIEW_SHARE)
