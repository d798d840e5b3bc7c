"""A clip's file to a larger, smoother one beside it; what made it and what finished it go along."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import animatediff
from animatediff.checkpoints.files import file_sha256
from animatediff.config.finish_refusals import finish_refusals
from animatediff.config.prompt_yaml import RunConfig, config_from
from animatediff.config.refusals import named
from animatediff.config.request import Request, Size
from animatediff.config.settings import listed
from animatediff.config.spellings import all_options, as_values, build_request, called, files, flat_names
from animatediff.features.inputs import input_sha256
from animatediff.media.sound import check_sound
from animatediff.media.video import read_metadata, read_video, save_video
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.device import pick_device, pick_dtype
from animatediff.pipeline.finish import Finisher, compare, file_of, second_pass, sound_of
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.outputs import one_line_when_full
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.rehearse import rehearse
from animatediff.pipeline.remembered import found_again, read_remembered
from animatediff.pipeline.run_folder import is_ours, recorded_dtype, settings_request
from animatediff.utils import UserError

SUFFIXES = {".gif": "gif", ".webp": "webp", "": "png"}  # of other files the result is an MP4
WRITTEN = ("output.format", "output.loop_count")  # beside `finish`, what may be chosen anew


def finish_clip(
    path: str | Path,
    overrides: Mapping[str, Any],
    *,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> tuple[Path, str]:
    """Finish the clip in a file or folder of frames as `overrides` say, options of `finish` above all.

    Args:
        output: by default beside the clip, `-finished` behind its name.
        device, dtype: as of `animate`.

    Returns:
        What was written, and what became of the clip (`compare`).

    Raises:
        UserError: nothing to do; a second pass over a clip without settings of ours; a file that is there already;
            whatever `animate` refuses.
    """
    path = Path(path)
    settings = read_metadata(path)
    if "finish" in settings:
        again = f", or make it again by animate.py --config {path} finish.…" if is_ours(settings) else ""
        raise UserError(f"got {path}, which is finished already: finish the clip that it was made from{again}")
    frames, fps = read_video(path)
    video = frames.movedim(-1, 1)
    request = _request(path, settings, overrides, len(video), fps)
    if not request.finish.changes and not request.finish.audio:
        raise UserError("got nothing to do, expected finish.scale=2, finish.interpolate=2 or the like (--help finish)")
    target = _target(path, request, output)
    if request.finish.audio:
        check_sound(file_of(request.finish.audio, "finish.audio"))
    with one_line_when_full(request):
        if request.finish.strength:
            finished = _resampled(video, request, path, device=device, dtype=dtype)
        else:
            finished = Finisher(request.finish, device=pick_device(device))(video[None], request)[0]
    metadata = _metadata(path, settings, request)
    save_video(finished, target, request.written_fps, metadata, loop=request.output.loop_count, sound=sound_of(request))
    return target, compare(video, finished)


def _request(path: Path, settings: Mapping[str, Any], overrides: Mapping[str, Any], frames: int, fps: float) -> Request:
    """What made the clip, and how it is finished."""
    for name in overrides:
        option = all_options().get(name) or flat_names().get(name)
        if name != "finish" and (option is None or option.group != "finish" and option.dotted not in WRITTEN):
            raise UserError(
                f"got {name}, expected options of finish, or {', '.join(WRITTEN)}: animate.py --config {path} "
                f"{name}=… makes the clip anew"
            )
    if is_ours(settings):
        raw = settings_request(settings)
        if not {"output.format", "format"} & set(overrides):
            overrides = {**overrides, "output.format": _format(path)}
        return config_from([raw], str(path), name=path.stem, overrides=overrides).entries[0]
    plain = {"output.fps": fps, "output.format": _format(path), "output.name": path.stem}
    plain = {k: v for k, v in plain.items() if not {k, k.partition(".")[2]} & set(overrides)}
    request = build_request({**plain, **overrides}, where="", check=False)
    request = replace(request, size=replace(Size(), num_frames=frames))
    rules = list(finish_refusals(request))
    if request.finish.strength:
        rules.append(
            f"{{finish.strength}}: got {path}, which holds no settings of ours, expected a clip that says what it was "
            "sampled from: a second pass needs its model and prompt; without one there are Lanczos, {finish.upscaler} "
            "and {finish.interpolate} (or animate.py with video=…)"
        )
    if rules:
        raise UserError(listed(named(rules, request, called)))
    return request


def _format(path: Path) -> str:
    return "png" if path.is_dir() else SUFFIXES.get(path.suffix.lower(), "mp4")


def _target(path: Path, request: Request, output: str | Path | None) -> Path:
    form = request.output.format
    ending = "" if form == "png" else f".{form}"
    stem = path.absolute().name.replace(".", "-") if path.is_dir() else path.stem  # a folder's has no ending
    target = Path(output) if output is not None else path.parent / f"{stem}-finished{ending}"
    if target.suffix != ending:
        other = next((f for f in ("gif", "mp4", "webp") if target.suffix == f".{f}"), None)
        hint = f": for a {other} add output.format={other}" if other else ""
        wanted = f"ending in {ending}" if ending else "of a folder, without an ending"
        raise UserError(f"got --output {target} for {form}, expected a name {wanted}{hint}")
    if target.exists():
        raise UserError(f"got {target} to write to, which is there already: remove it, or choose another by --output")
    return target


def _resampled(video: Tensor, request: Request, path: Path, *, device: str, dtype: str | None) -> Tensor:
    """The clip finished with a second pass: its networks are loaded as its settings name them."""
    if (size := tuple(video.shape[-2:])) != (request.size.height, request.size.width):
        height, width = size
        raise UserError(
            f"got {path} of {width}x{height} pixels, whose settings speak of {request.size.width}x"
            f"{request.size.height}, expected the clip as it was written: finish.strength=0 needs no settings"
        )
    target, known = pick_device(device), read_remembered(path)
    config, moved = found_again(RunConfig("", (request,)), known.hashes, path.parent, {})
    (request,) = config.entries
    (checked,) = check_requests([second_pass(request, video[None])])
    rehearse([checked], loaded_next=True)
    dtype = dtype or recorded_dtype(known.made_on, target)
    model = Assembler(target, pick_dtype(dtype, target)).assemble(checked)
    for line in [*moved, *model.reports]:
        print(line, file=sys.stderr)
    pipeline = AnimateDiffPipeline(model)
    return pipeline.finish(video[None], request)[0]


def _metadata(path: Path, settings: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """The clip's own settings, and how it was finished; of a clip without them, which one it was."""
    now = as_values(request, changed_only=True)
    used = {o: file for o, file in files(request).items() if o.startswith("finish.")}
    hashes = {o: {"path": f.path, "sha256": file_sha256(file_of(f.path, f.called))} for o, f in used.items()}
    if is_ours(settings):
        first = {k: v for k, v in settings.items() if k not in ("frames", "fps")}
    else:
        first = {"finished_from": {"path": path.name, "sha256": input_sha256(path)}}
    first["files"] = {**first.get("files", {}), **hashes}
    return {**first, "finish": now["finish"], "output": now["output"], "animatediff": animatediff.__version__}
