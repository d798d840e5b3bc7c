"""What a request takes before anything is loaded, and which switches of memory let it fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from animatediff.checkpoints.parts import read_image_parts, read_motion_parts, read_vae_parts
from animatediff.checkpoints.sizes import motion_config, unet_config, vae_config
from animatediff.config.memory_options import Memory
from animatediff.config.request import Request, Windows
from animatediff.features.registry import NETWORKS
from animatediff.pipeline.device import has_own_memory
from animatediff.pipeline.finish import second_size
from animatediff.pipeline.headers import Checked
from animatediff.pipeline.memory import check_memory
from animatediff.pipeline.plan import OVERHEAD, MemoryPlan, Sizes, plan_memory
from animatediff.utils import UserError

WIDE, SHORT = 16_384, 8  # latent pixels of a chunk, frames of a window
CHANGES = {  # option -> what it does to the clip
    "batch_size": "equal but for rounding",
    "offload": "exact",
    "vae_frames": "exact",
    "chunk_tokens": "equal but for rounding",
    "split_guidance": "equal but for rounding",
    "weights": "weights are rounded, unless their file holds this type",
    "vae_tile": "not exact: every tile is normalised by itself",
    "windows": "not exact: fewer frames know each other",
}


@dataclass(frozen=True)
class Fit:
    """A request that fits, what it takes, and the names of the switches that were chosen for it."""

    request: Request
    plan: MemoryPlan
    chosen: tuple[str, ...] = ()

    def switches(self) -> list[str]:
        """A line for every switch that is on: its value, what it changes, who set it."""
        memory, lines = self.request.memory, []
        for name, change in CHANGES.items():
            value, default = getattr(memory, name, None), getattr(Memory(), name, None)
            if name == "windows" and "windows" in self.chosen and (windows := self.request.windows):
                value = f"{windows.schedule}, {windows.length} frames"
            if value != default:
                said = f"{name}={str(value).lower()}"
                lines.append(f"{said} ({change}{'; chosen' if name in self.chosen else ''})")
        return lines


def fit(checked: Checked, device: torch.device, dtype: torch.dtype) -> Fit | None:
    """The request with the switches that its budget needs; None where there is no budget, or plenty.

    The budget is `memory.max`, or what is free on a GPU. What was set by hand stays as it is.

    Raises:
        UserError: it cannot fit, or a switch that the device does not have.
    """
    request = checked.request
    check_memory(request.memory, device)
    budget = budget_of(request.memory, device)
    if budget is None:
        return None
    sizes = sizes_of(checked)
    if not request.memory.max and rough_bound(sizes, request, dtype, device) < budget:
        return None
    return choose(request, budget, partial(plan_request, sizes=sizes, device=device, dtype=dtype), device)


def fitted(checked: Checked, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]) -> Checked:
    """The same with what `fit` chose, which it says. Raises: as `fit`."""
    if (found := fit(checked, device, dtype)) is None:
        return checked
    for line in found.switches() if found.chosen else ():
        say(f"entry {checked.request.output.name}, to fit into memory: {line}")
    return replace(checked, request=found.request)


def recorded(request: Request, chosen: Request) -> Request:
    """What a run writes down: of the switches that were chosen those alone that change the clip."""
    exact = {name: getattr(request.memory, name) for name, change in CHANGES.items() if change.startswith("e")}
    return replace(chosen, memory=replace(chosen.memory, **exact))


def as_begun(checked: Checked, begun: Request) -> Checked:
    """With the switches that change clips as the folder of the run has them, which may be older."""
    changing = {name: getattr(begun.memory, name) for name in ("weights", "vae_tile")}
    memory = replace(checked.request.memory, **changing)
    return replace(checked, request=replace(checked.request, windows=begun.windows, memory=memory))


def budget_of(memory: Memory, device: torch.device) -> int | None:
    """Bytes that may be used; None for no bound."""
    if memory.bytes is not None or not has_own_memory(device):
        return memory.bytes
    return torch.cuda.mem_get_info(device)[0] + OVERHEAD["cuda"] // 2  # the context is there already


def choose(request: Request, budget: int, plan: Callable[[Request], MemoryPlan], device: torch.device) -> Fit:
    """Switches in the order of what they cost, those that are exact first, and of these only what is needed.

    Raises:
        UserError: not even all of them are enough.
    """
    best, least, taken = request, plan(request), []
    for switch in ladder(request, device):
        if least.peak <= budget:
            break
        tried = switch(best)
        made = plan(tried)
        if _total(made) < _total(least):
            best, least = tried, made
            taken.append(switch)
    if least.peak > budget:
        r = best.size
        raise UserError(
            f"got {budget // 10**6:,} MB of memory for {r.num_frames} frames of {r.height}x{r.width}, expected at "
            f"least {-(-least.peak // 10**6):,} MB: raise max_memory, or choose smaller L, H or W"
        )
    for switch in taken[:-1]:
        fewer = [other for other in taken if other is not switch]
        tried = request
        for other in fewer:
            tried = other(tried)
        if (made := plan(tried)).peak <= budget:
            best, least, taken = tried, made, fewer
    return Fit(best, least, _changed(request, best))


def ladder(request: Request, device: torch.device) -> Iterator[Callable[[Request], Request]]:
    """Switches that the user has not set, the cheapest first; `batch_size` says what there is at most."""

    def memory(name: str, value: object) -> Iterator[Callable[[Request], Request]]:
        if f"memory.{name}" not in request.spelled:
            yield lambda r: replace(r, memory=replace(r.memory, **{name: value}))

    def batch(size: int) -> Callable[[Request], Request]:
        return lambda r: replace(r, memory=replace(r.memory, batch_size=size))

    size = clips_together(request)
    while size > 1:
        size //= 2
        yield batch(size)
    apart = has_own_memory(device)
    if apart and request.memory.offload == "none":
        yield from memory("offload", "idle")
    for frames in (4, 2, 1):
        if frames < request.memory.vae_frames:
            yield from memory("vae_frames", frames)
    yield from memory("chunk_tokens", WIDE)
    if (request.sampling.guidance_scale or 0) > 1 or request.pag.scale:
        yield from memory("split_guidance", True)
    yield from memory("chunk_tokens", WIDE // 4)
    yield from memory("offload", "blocks") if apart else memory("weights", "float16")
    for tile in (512, 256):
        if tile < max(request.size.height or 0, request.size.width or 0):
            yield from memory("vae_tile", tile)
    if "windows.length" not in request.spelled and request.model.motion_module and not request.inputs.extend:
        yield _short_windows
    if not apart:
        yield from memory("weights", "float8")


def _short_windows(request: Request) -> Request:
    w = request.windows or Windows(schedule="open")  # type: ignore[call-arg]
    if request.size.num_frames <= SHORT or (w.length and w.length <= SHORT) or request.loop.mode == "rotate":
        return request
    return replace(request, windows=replace(w, length=SHORT, overlap=min(w.overlap or SHORT // 4, SHORT // 2)))


def _changed(before: Request, after: Request) -> tuple[str, ...]:
    a, b = before.memory, after.memory
    names = [name for name in vars(a) if getattr(a, name) != getattr(b, name)]
    return (*names, *(["windows"] if before.windows != after.windows else []))


def _total(plan: MemoryPlan) -> int:
    return sum(plan.weights.values()) + sum(plan.stages.values())


# ---- what a request takes -----------------------------------------------------------------------------------------


def plan_request(request: Request, *, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> MemoryPlan:
    """What the clips of a request take, one batch after the other; with a second pass, what the larger one takes."""
    size, finish = request.size, request.finish
    height, width, seen = size.height or 512, size.width or 512, 0
    if finish.strength:
        height, width = second_size((height, width), finish.scale or 1, sizes.vae.downsampling)
        seen = finish.tile
    return plan_memory(
        sizes,
        frames=size.num_frames,
        height=height,
        width=width,
        tile=seen,
        window=request.windows.length if request.windows else None,
        clips=clips_together(request),
        parts=parts_of(request),
        memory=request.memory,
        dtype=dtype,
        device=device.type,
        beside={} if has_own_memory(device) else {"Python and torch": resident_bytes()},
    )


def parts_of(request: Request) -> int:
    """Of guidance: as many predictions make one step."""
    return 1 + ((request.sampling.guidance_scale or 0) > 1) + bool(request.pag.scale)


def clips_together(request: Request) -> int:
    """Of the largest batch."""
    return max(min(request.memory.batch_size, len(request.prompts.prompt)), 1)


def rough_bound(sizes: Sizes, request: Request, dtype: torch.dtype, device: torch.device) -> int:
    """More than a plan would ever find, without its seconds: twice what maps of the finest level take."""
    size, side = request.size, sizes.vae.downsampling
    pixels = (size.height or 512) * (size.width or 512)
    window = min(request.windows.length if request.windows else size.num_frames, size.num_frames)
    pixels = int(pixels * (request.finish.scale or 1) ** 2)
    step = (
        40
        * clips_together(request)
        * parts_of(request)
        * window
        * (pixels // side**2)
        * sizes.unet.block_out_channels[0]
    )
    decode = 24 * min(request.memory.vae_frames, size.num_frames) * pixels * sizes.vae.block_out_channels[0]
    weights = sum(sizes.others.values()) + sizes.texts + 4 * 10**9
    return (max(step, decode) + weights) * dtype.itemsize + OVERHEAD.get(device.type, 0)


def sizes_of(checked: Checked) -> Sizes:
    """The sizes of a request's networks, of which only the headers are read.

    Raises:
        UserError: a file is incomplete.
    """
    request, headers = checked.request, checked.headers
    paths = headers.paths
    base = read_image_parts(paths["model.base"])
    personal = read_image_parts(paths["model.personalised"]) if "model.personalised" in paths else base
    unet, vae = unet_config(personal.unet, base.metadata | personal.stated), None
    if "model.vae" in paths:
        own = read_vae_parts(paths["model.vae"])
        vae = vae_config(own.tensors, base.metadata | own.metadata)
    elif tensors := personal.vae or base.vae:
        vae = vae_config(tensors, base.metadata | personal.stated)
    if vae is None:
        raise UserError(f"got {base.path} without a VAE, expected one: give a VAE by vae_path")
    texts = [part for name in ("text", "text_2") for part in [getattr(personal, name) or getattr(base, name)] if part]
    if "model.motion_module" in paths:
        motion = read_motion_parts(paths["model.motion_module"])
        unet = unet.with_motion(
            motion_config(
                motion.tensors,
                motion.metadata,
                levels=len(unet.block_out_channels),
                length=motion.length,
                version=headers.version(request),
                norm_over_frames=request.model.norm_over_frames,
            )
        )
    others: dict[str, int] = {}
    for option, info in headers.infos.items():
        if (group := re.split(r"[.\[]", option)[0]) in NETWORKS:
            others[group] = others.get(group, 0) + info.num_parameters
    return Sizes(
        unet,
        vae,
        texts=sum(t.numel() for part in texts for t in part.values()),
        others=others,
        residuals=bool(others.keys() & {"sparsectrl", "controlnets"}),
        decodes_in_float32=headers.sdxl,
    )


def resident_bytes() -> int:
    """What this process holds now; 0 where nobody tells."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def work_of(request: Request) -> int:
    """Latent pixels of all clips, frames and parts of guidance in a step: what its time is counted by."""
    size = request.size
    return prod(
        (
            clips_together(request),
            parts_of(request),
            size.num_frames,
            (size.height or 512) // 8,
            (size.width or 512) // 8,
        )
    )
