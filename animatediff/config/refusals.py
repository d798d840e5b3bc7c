"""What options must not say together: one list of rules for YAML, command line and call. Needs no file and no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from animatediff.config.clip_formats import LOOPING
from animatediff.config.condition_refusals import condition_refusals
from animatediff.config.finish_refusals import finish_refusals
from animatediff.config.keyframes import Keyframes
from animatediff.config.request import Request
from animatediff.utils import UserError

STRENGTHS = {"extend": 1.0, "mask": 1.0, "video": 0.8, "image": 0.9, "last_image": 0.9}  # default of the first given


def refusals(
    request: Request,
    called: Callable[[Request, str], str],
    *,
    motion: bool | None = None,
    loras: Sequence[str] | None = None,
    sparsectrl: bool | None = None,
    embeds: bool = False,
    complete: bool = True,
) -> Iterator[str]:
    """One message for every rule that a request breaks, options under the names that the user gave them.

    Args:
        called: (request, "group.name") -> that name.
        motion, loras, sparsectrl: whether there is a motion module, which of model.loras and model.motion_loras
            there are, whether there is a SparseCtrl encoder; by default as the request's files say.
        embeds: the prompts come as embeddings.
        complete: False where a call is yet to say which pictures ControlNets and the like get.
    """
    m = request.model
    motion = bool(m.motion_module) if motion is None else motion
    sparsectrl = bool(request.sparsectrl.path) if sparsectrl is None else sparsectrl
    if loras is None:
        loras = [name for name in ("loras", "motion_loras") if getattr(m, name)]
    rules = (
        *_prompts(request, embeds),
        *_inputs(request),
        *_steering(request, motion=motion, loras=loras),
        *_sparsectrl(request, sparsectrl),
        *condition_refusals(request, motion=motion, complete=complete),
        *window_refusals(request),
        *_memory(request),
        *finish_refusals(request),
    )
    if not m.base:
        rules += ("{model.base}: got none, expected the base model: a diffusers folder or a file",)
    if m.motion_loras and not motion:
        rules += ("got {model.motion_loras} without a motion_module, expected the one they were trained on, v2 for the "
                  "official ones: add it",)  # fmt: skip
    if request.output.loop_count and request.output.format not in LOOPING:
        got = f"{{output.loop_count}}: got {request.output.loop_count} for {request.output.format}"
        rules += (f"{got}, expected 0: only GIF and WebP files say how often they play",)
    yield from named(rules, request, called)


def named(rules: Iterable[str], request: Request, called: Callable[[Request, str], str]) -> Iterator[str]:
    """Messages whose {group.name} are as the user called them."""
    for rule in rules:
        yield re.sub(r"\{(\w+\.\w+)\}", lambda match: called(request, match[1]), rule)


def _prompts(request: Request, embeds: bool) -> Iterator[str]:
    p, s, n = request.prompts, request.sampling, len(request.prompts.prompt)
    if not n and not embeds and "prompts.prompt" not in request.spelled:
        yield "prompt is missing, expected text (in quotes), a list of texts, or keyframes {frame: text}: add it"
    elif not n and not embeds:
        yield "{prompts.prompt}: got an empty list, expected at least one prompt"
    for name, values, allowed in (
        ("prompts.negative_prompt", p.negative_prompt, (0, 1, n)),
        ("sampling.seed", s.seed, (1, n)),
        ("sampling.random_seed", s.random_seed, (0, n)),
    ):
        if (count := len(values)) not in allowed and n:
            expected = " or ".join(str(a) for a in sorted(set(allowed)) if a)
            yield (f"{{{name}}}: got {count} value{'s' * (count != 1)} for {n} prompt{'s' * (n > 1)}, expected "
                   f"{expected}: give one for all prompts, or one per prompt")  # fmt: skip
    for name, texts in (("prompts.prompt", p.prompt), ("prompts.negative_prompt", p.negative_prompt)):
        for text in texts:
            if isinstance(text, dict) and (last := max(text)) >= request.size.num_frames:
                f = request.size.num_frames
                yield (f"{{{name}}}: got a keyframe at {last}, expected 0 to {f - 1}, as the clip has {f} frames: "
                       "move it, or make the clip longer by {size.num_frames}")  # fmt: skip


def _inputs(request: Request) -> Iterator[str]:
    i = request.inputs
    present = {name for name in ("video", "image", "last_image", "mask") if getattr(i, name) is not None}
    present |= {name for name in ("extend", "inversion") if getattr(i, name)}
    if i.strength is not None and not present:
        yield "{inputs.strength} needs something to start from: add a video or an image, or remove {inputs.strength}"
    for name in ("mask", "inversion", "extend"):
        if name in present and "video" not in present:
            yield f"{{inputs.{name}}} needs a video: add {{inputs.video}}, or remove {{inputs.{name}}}"
    for one, other in (("video", "image"), ("video", "last_image"), ("extend", "mask"), ("extend", "inversion")):
        if one in present and other in present:
            yield f"got both {{inputs.{one}}} and {{inputs.{other}}}, expected one of them: remove the other"
    if request.size.num_frames == 1 and present >= {"image", "last_image"}:
        yield ("got {inputs.image} and {inputs.last_image} for a clip of 1 frame, expected at least 2: raise "
               "{size.num_frames}")  # fmt: skip
    if "extend" in present and request.loop.mode == "rotate":
        yield "{loop.mode}: got rotate with {inputs.extend}, expected one of them: a clip that is extended is no loop"
    for name, default in (("video_start", 0), ("video_stride", 1), ("video_fps", None)):
        if getattr(i, name) != default and "video" not in present:
            yield f"{{inputs.{name}}} needs a video: add {{inputs.video}}, or remove {{inputs.{name}}}"


def _steering(request: Request, *, motion: bool, loras: Sequence[str]) -> Iterator[str]:
    frames, m, g = request.size.num_frames, request.motion, request.guidance
    if request.loop.mode == "rotate" and request.windows is not None:
        yield ("{loop.mode}: got rotate with windows, expected one of them: {windows.schedule}=closed is a loop")
    for name, default in (("scale", None), ("mask", ""), ("stretch", 1.0)):
        if not motion and getattr(m, name) != default:
            yield (f"{{motion.{name}}} needs a motion_module: set {{model.motion_module}}, or remove {{motion.{name}}}")
    if request.pag.layers != ("mid_block",) and not request.pag.scale:
        yield "{pag.layers} needs a {pag.scale} above 0, such as 3: set it, or remove {pag.layers}"
    for name, raw in (
        ("motion.scale", m.scale),
        ("guidance.schedule", g.schedule),
        ("loras.schedule", request.loras.schedule),
        ("loras.motion_schedule", request.loras.motion_schedule),
    ):
        if raw is not None:
            try:
                Keyframes.read(raw).check(frames)
            except UserError as error:
                yield f"{{{name}}}: {error}"
    for name, needed in (("loras.schedule", "loras"), ("loras.motion_schedule", "motion_loras")):
        if getattr(request.loras, name.partition(".")[2]) is not None and needed not in loras:
            yield f"{{{name}}} needs LoRAs to schedule: set {{model.{needed}}}, or remove {{{name}}}"


def _memory(request: Request) -> Iterator[str]:
    for name in ("schedule", "motion_schedule"):
        if request.memory.weights == "float8" and getattr(request.loras, name) is not None:
            yield (f"{{loras.{name}}}: got scales that change, expected fixed ones with {{memory.weights}}=float8: "
                   "choose bfloat16")  # fmt: skip


def _sparsectrl(request: Request, encoder: bool) -> Iterator[str]:
    c, frames = request.sparsectrl, request.size.num_frames
    given = len(c.images) > 0
    if not encoder:
        for name, default in (
            ("images", ()),
            ("config", ""),
            ("frames", (0,)),
            ("scale", (1.0,)),
            ("normalize", False),
        ):
            value = getattr(c, name)
            if given if name == "images" else value != default:
                yield (f"{{sparsectrl.{name}}} needs a SparseCtrl encoder: set {{sparsectrl.path}}, or remove "
                       f"{{sparsectrl.{name}}}")  # fmt: skip
                return
        return
    if given:
        try:
            condition_frames(c.frames, images=len(c.images), frames=frames)
        except UserError as error:
            yield f"{{sparsectrl.frames}}: {error}"
    if len(c.scale) not in (1, frames):
        yield (f"{{sparsectrl.scale}}: got {len(c.scale)} scales, expected one for all frames, or one for each of the "
               f"{frames}")  # fmt: skip


def condition_frames(indices: Sequence[int], *, images: int, frames: int) -> tuple[int, ...]:
    """The frames of a clip that images are given for, counted from 0; in `indices` -1 is the last frame.

    Raises:
        UserError: no image, not one index for each, one outside the clip, or one twice.
    """
    if not 1 <= images <= frames:
        raise UserError(f"got {images} condition images, expected 1 to {frames}, the frames of the clip")
    if len(indices) != images:
        raise UserError(f"got {len(indices)} frame numbers for {images} condition images, expected one for each")
    if outside := [i for i in indices if not -frames <= i < frames]:
        raise UserError(f"got frame {outside[0]}, expected 0 to {frames - 1}, or -1 (the last) to {-frames}")
    counted = tuple(i % frames for i in indices)
    if twice := [i for i in counted if counted.count(i) > 1]:
        raise UserError(f"got frame {twice[0]} twice, expected another frame for each image")
    return counted


def window_refusals(request: Request) -> Iterator[str]:
    """The rules of windows alone."""
    if (w := request.windows) is None:
        return
    length = w.length or 16
    if w.overlap is not None and w.overlap >= length:
        yield f"{{windows.overlap}}: got {w.overlap}, expected 0 to {length - 1}, less than {{windows.length}}"
    if w.stride > 1 and w.schedule != "uniform":
        yield f"{{windows.stride}}: got {w.stride}, expected 1, or more with {{windows.schedule}}=uniform"
