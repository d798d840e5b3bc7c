"""What the page shows of jobs and clips, as HTML; all text of people is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from animatediff.media.video import VIDEO_SUFFIXES
from animatediff.page.jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job
from animatediff.page.preview import thumbnail
from animatediff.utils import UserError

EMPTY = '<div class="stage empty"><p>Your clip appears here.</p></div>'


def current(jobs: Sequence[Job]) -> Job | None:
    """The job of a person that the stage shows: what runs, else what waits, else what ended last."""
    for state in (RUNNING, WAITING):
        if found := [job for job in jobs if job.state == state]:
            return found[0]
    return jobs[-1] if jobs else None


def stage(job: Job | None, before: int = 0, last: str = "") -> str:
    """The large picture: how far a job is, or what came of it.

    Args:
        before: jobs before a waiting one.
        last: clip of the person's that was finished last, shown while the next one has no preview yet.
    """
    if job is None:
        return EMPTY
    if job.state == DONE:
        return f'<div class="stage">{clip(job.result, job.title)}</div>'
    if job.state == FAILED:
        return f'<div class="stage empty"><p class="sentence">{escape(job.message)}</p></div>'
    if job.state == CANCELLED:
        return '<div class="stage empty"><p>Cancelled.</p></div>'
    if job.preview:
        picture = f'<img class="preview" src="{data_uri(job.preview)}" alt="preview of {escape(job.title)}">'
    else:
        picture = clip(last, "the clip before") if last else '<p class="waiting">…</p>'
    return f'<div class="stage busy">{picture}{progress(job, before)}</div>'


def progress(job: Job, before: int) -> str:
    """A bar and a line."""
    text = status(job, before)
    bar = f'<progress max="{job.total or 1}" value="{job.done}" aria-label="{escape(text)}"></progress>'
    return f'{bar}<p role="status">{escape(text)}</p>'


def status(job: Job, before: int = 0) -> str:
    """One line on a job."""
    if job.state == WAITING:
        return f"Waiting, {before} before it" if before else "Waiting"
    if job.state != RUNNING:
        return {DONE: "Done", CANCELLED: "Cancelled"}.get(job.state, job.message)
    if job.message:
        return job.message + " …"
    left = job.seconds_left
    steps = f"Step {job.done} of {job.total}" if job.total else "First step"
    return steps if left is None else f"{steps}, {duration(left)} left"


def duration(seconds: float) -> str:
    """Rounded as people say it."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def job_list(jobs: Sequence[Job], before: dict[str, int]) -> str:
    """The jobs of a person that are not done, the newest first, where there are several."""
    jobs = [job for job in jobs if job.state in (RUNNING, WAITING, FAILED)]
    if len(jobs) < 2:
        return ""
    rows = (
        f'<li class="{job.state}"><span>{escape(shortened(job.title))}</span>'
        f"<span>{escape(status(job, before.get(job.id, 0)))}</span></li>"
        for job in reversed(jobs[-8:])
    )
    return f'<ol class="jobs" aria-label="your clips">{"".join(rows)}</ol>'


def clip(path: str, title: str) -> str:
    """A clip that plays."""
    name = escape(title, quote=True)
    if not path:
        return ""
    if Path(path).is_dir():
        return picture_of(path, title)
    source = f"gradio_api/file={quote(str(Path(path).absolute()))}"
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        return f'<video src="{source}" autoplay loop muted controls playsinline aria-label="{name}"></video>'
    return f'<img src="{source}" alt="{name}">'


def picture_of(path: str, title: str) -> str:
    """A small picture of a file, made here: the file itself never gets to the browser."""
    try:
        return f'<img src="{data_uri(thumbnail(path))}" alt="{escape(title, quote=True)}">'
    except UserError as error:
        return sentence_html(str(error))


def data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def sentence_html(text: str) -> str:
    return f'<p class="sentence" role="alert">{escape(text)}</p>' if text else ""


def help_html(text: str) -> str:
    return f'<p class="help">{escape(text)}</p>'


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
