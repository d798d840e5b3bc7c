"""A job of the page to a clip, as the command line makes it: tells how far it is, stops when it is called off."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from animatediff.config.prompt_yaml import RunConfig, load_config
from animatediff.config.spellings import build_request
from animatediff.media.video import is_complete
from animatediff.page.jobs import Job, Journal
from animatediff.page.preview import LatentPreview, animated
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import Follower, animate, plan
from animatediff.pipeline.run_folder import new_folder
from animatediff.utils import is_out_of_memory

NAME = "page"  # how the folders of its clips begin
PREVIEW_SECONDS, PREVIEW_SHARE = 1.0, 0.1  # at most one preview in so many seconds, and in so much of the time


class Maker:
    """Makes one clip after the other; the image model stays loaded.

    Args:
        output: the folder that gets `page-<time>/` for each clip.
        journal: is told which folder a job has begun.
        assembler: loads the networks, on its device.
    """

    def __init__(self, output: Path, journal: Journal, assembler: Assembler):
        self.output, self.journal, self.assembler = output, journal, assembler

    def __call__(self, job: Job) -> str:
        """The clip's path. A job that was begun before goes on in its folder."""
        config = RunConfig(NAME, (build_request({"name": "1", **job.settings}, where=""),))
        begun = Path(job.note) if job.note else None
        folder = begun if begun and (begun / "config.yaml").is_file() else new_folder(NAME, self.output)
        job.note, job.message = str(folder), "Loading the model"
        self.journal.write(job)
        follower = JobFollower(job, config.entries[0].output.fps)
        try:
            animate(config, output_dir=folder, assembler=self.assembler, follower=follower)
        except BaseException:
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

    def __init__(self, job: Job, fps: float):
        self.job, self.fps = job, fps
        self._hooks = []
        self._preview: LatentPreview | None = None
        self._next = 0.0

    def loaded(self, pipeline: AnimateDiffPipeline) -> None:
        def check(*_: object) -> None:
            self.job.check()

        vae = pipeline.vae
        self._hooks = [m.register_forward_pre_hook(check) for m in (pipeline.unet, vae.encoder, vae.decoder)]
        self._preview = LatentPreview(vae)
        self.job.message = ""
        self.job.sampling_since = time.monotonic()

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
        if self._preview is None or now < self._next or not bool(latents.isfinite().all()):
            return
        try:
            self.job.preview = animated(self._preview.frames(latents), self.fps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._preview = None  # a clip without a preview is better than none
            return
        took = time.monotonic() - now
        self._next = now + max(PREVIEW_SECONDS, took / PREVIEW_SHARE)
