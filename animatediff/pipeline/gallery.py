"""What was made, on one page: a static HTML file beside the clips, which plays them and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from animatediff.config.prompt_yaml import config_from
from animatediff.config.request import Request
from animatediff.config.settings import dump_yaml
from animatediff.config.spellings import as_values, files
from animatediff.media.video import read_metadata
from animatediff.pipeline.remembered import read_remembered
from animatediff.pipeline.run_folder import settings_request
from animatediff.utils import UserError, replacing

TEMPLATE = Path(__file__).parents[1] / "assets/gallery.html"
VIDEOS = (".mp4", ".m4v", ".mov", ".webm")  # that browsers play
PICTURES = (".gif", ".webp", ".png", ".apng")
OURS = '<meta name="generator" content="animatediff gallery">'
LONGEST_PROMPT, LONGEST_SETTINGS = 5_000, 30_000  # characters that are shown
MOST_FLIPPED = 1_000  # pictures of a folder that are played


@dataclass(frozen=True)
class Clip:
    """A file, or a folder of frames, and what it says of how it was made: as it stands there, and as a request."""

    path: Path
    settings: Mapping[str, Any]
    request: Request | None
    theirs: tuple[str, ...] | None = None  # names of weight files, as another program tells them

    @property
    def models(self) -> list[str]:
        """The names of its weight files."""
        if self.theirs is not None:
            return list(self.theirs)
        if self.request is None:
            return []
        used = files(self.request)
        hidden = {"model.base"} if "model.personalised" in used else set()  # its UNet is not used
        return list(dict.fromkeys(Path(f.path).stem for o, f in used.items() if f.kind.kinds and o not in hidden))


def write_gallery(folder: str | Path, output: str | Path | None = None) -> tuple[Path, int, list[str]]:
    """Write the page of all clips under a folder, the newest first.

    Args:
        output: by default `index.html` in the folder; a gallery that is there is written anew.

    Returns:
        The page, how many clips are on it, and a line for each file that cannot be read.

    Raises:
        UserError: no such folder, no clip in it, or a page that is something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"got {folder}, which is no folder, expected one with clips, such as samples")
    output = folder / "index.html" if output is None else Path(output)
    if output.exists() and not (output.is_file() and OURS.encode() in output.read_bytes()[:2000]):
        raise UserError(f"got {output} to write to, which is no gallery: choose another by --output")
    try:
        os.path.relpath(folder.absolute(), output.absolute().parent)
    except ValueError:  # Windows
        raise UserError(f"got {output} on another drive than {folder}, expected the same: choose another --output")\
            from None  # fmt: skip
    clips, problems = read_clips(find_clips(folder))
    if not clips:
        raise UserError(f"got {folder}, in which there are no clips: expected some ({', '.join(PICTURES + VIDEOS)})")
    clips.sort(key=lambda clip: clip.path.stat().st_mtime, reverse=True)
    title = f"{folder.absolute().name} · AnimateDiff"
    with replacing(output) as temporary:
        temporary.write_bytes(page(clips, output.absolute().parent, title, problems).encode(errors="replace"))
    return output, len(clips), problems


def find_clips(folder: Path) -> Iterator[Path]:
    """Files that browsers play, and folders of frames; what is hidden or lies behind a link is passed over."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "0000.png" in names:
            yield Path(place)
            continue
        for name in sorted(names):
            if name.lower().endswith(PICTURES + VIDEOS) and not name.startswith("."):
                yield Path(place) / name


def read_clips(paths: Iterable[Path]) -> tuple[list[Clip], list[str]]:
    """Clips with their settings, and a line for each file that cannot be read.

    Left out are the grids of runs, whose clips are there themselves, and pictures that say nothing, such as those a
    clip was made from.
    """
    clips, problems = [], []
    for path in paths:
        try:
            settings = read_metadata(path)
        except UserError as error:
            problems.append(str(error))
            continue
        grid = isinstance(settings.get("prompts"), list) and "prompt" not in settings
        if grid:
            continue
        request = _request(settings, path)
        if request is None and (theirs := _of_another_program(path)):
            clips.append(theirs)
        elif settings or path.suffix.lower() != ".png":
            clips.append(Clip(path, settings, request))
    return clips, problems


def page(clips: Iterable[Clip], place: Path, title: str, problems: Iterable[str] = ()) -> str:
    """The HTML of clips; `place` is the folder that links start from. Everything that files say is escaped."""
    clips = list(clips)
    models = sorted({name for clip in clips for name in clip.models}, key=str.lower)
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "models": "".join(f"<option>{escape(name)}</option>" for name in models),
        "count": f"{len(clips)} clip{'s' * (len(clips) != 1)}",
        "clips": "\n".join(_article(clip, place) for clip in clips),
        "footer": "".join(f"<p>left out: {escape(line[:500])}</p>" for line in problems),
        **{f"{tag}-hash": _digest(template, tag) for tag in ("style", "script")},
    }
    return re.sub(r"\{\{([\w-]+)\}\}", lambda match: parts[match[1]], template)


def _digest(template: str, tag: str) -> str:
    """The hash by which the page's policy lets its own style and script run, and no other."""
    inside = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}"


def _request(settings: Mapping[str, Any], path: Path) -> Request | None:
    """What a clip was made from; None where its settings do not say, or what they say is no request."""
    try:
        return config_from([settings_request(settings)], str(path), name=path.stem, complete=False).entries[0]
    except UserError:
        return None


def _of_another_program(path: Path) -> Clip | None:
    """A clip with what AUTOMATIC1111 or ComfyUI wrote into it, in our words."""
    try:
        known = read_remembered(path)
        request = known.request()
    except UserError:
        return None
    if known.foreign is None or not request.prompts.prompt:
        return None
    wanted = known.foreign.wanted
    told = {
        "program": known.program,
        **as_values(request, changed_only=True),
        "files": [f"{file.option}: {file.name} {file.digits}".strip() for file in wanted],
        "no counterpart": known.foreign.without,
    }
    return Clip(path, told, request, tuple(dict.fromkeys(Path(file.name.replace("\\", "/")).stem for file in wanted)))


def _article(clip: Clip, place: Path) -> str:
    name = os.path.relpath(clip.path.absolute(), place)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(clip.path.stat().st_mtime))
    prompt, seed, facts = "no settings in the file", "", [made]
    if clip.request is not None:
        ((text, _, number), *_) = clip.request.per_prompt()
        prompt = text if isinstance(text, str) else "\n".join(f"{frame}: {words}" for frame, words in text.items())
        seed, steps = str(number) if number >= 0 else "", clip.request.sampling.steps
        facts = [
            f"seed {seed}" * bool(seed),
            f"{steps} steps" * bool(steps),
            f"{clip.request.size.num_frames} frames",
            made,
        ]
    models = "".join(f"<li>{escape(model)}</li>" for model in clip.models)
    rows = (
        f'<p class="prompt">{escape(_cut(prompt, LONGEST_PROMPT))}</p>',
        f'<p class="facts">{escape(" · ".join(filter(None, facts)))}</p>',
        f"<ul>{models}</ul>" if models else "",
        f"<details><summary>{escape(name)}</summary>{_details(clip)}</details>",
    )
    player = _player(clip, place)
    return f'<article data-seed="{escape(seed)}">{player}<div class="text">{"".join(rows)}</div></article>'


def _player(clip: Clip, place: Path) -> str:
    def link(path: Path) -> str:
        return quote(os.fsencode(os.path.relpath(path.absolute(), place).replace(os.sep, "/")))

    size = clip.request.size if clip.request else None
    sides = f' width="{size.width}" height="{size.height}"' if size and size.width and size.height else ""
    if clip.path.suffix.lower() in VIDEOS:
        return f'<video src="{link(clip.path)}"{sides} controls loop muted playsinline preload="metadata"></video>'
    first, flipped = clip.path, ""
    if clip.path.is_dir():
        frames = sorted(clip.path.glob("*.png"))[:MOST_FLIPPED]
        first, fps = frames[0], clip.settings.get("fps", 8)
        flipped = f' data-fps="{fps:g}" data-frames="{escape(json.dumps([link(frame) for frame in frames]))}"'
    return f'<a href="{link(clip.path)}"><img src="{link(first)}"{sides}{flipped} loading="lazy" alt=""></a>'


def _details(clip: Clip) -> str:
    """The settings as YAML, and the command that makes the clip again."""
    again = shlex.join(["python", "scripts/animate.py", "--config", str(clip.path)])
    command = f'<pre class="again">{escape(again)}</pre>' if clip.request else ""
    return f"{command}<pre>{escape(_cut(dump_yaml(dict(clip.settings)), LONGEST_SETTINGS))}</pre>"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"
