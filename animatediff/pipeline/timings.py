"""How long steps took on this machine, remembered in the user's cache, to say how long the next clip will take."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from animatediff.config.request import Request
from animatediff.pipeline.fit import clips_together, work_of
from animatediff.utils import read_cache, write_cache

REMEMBERED = "timings.json"
MOST = 200  # classes, and sizes of each, that are remembered


def shape_class(request: Request, device: torch.device, dtype: torch.dtype) -> str:
    """What a measurement holds for, beside its size: machine, type, networks, switches."""
    name, m, on_gpu = networks_name(request), request.memory, device.type == "cuda"
    machine = (
        torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} {torch.get_num_threads()} threads"
    )
    switches = (m.chunk_tokens, m.split_guidance, m.offload, m.weights, request.windows is not None)
    return " | ".join(map(str, (device.type, machine, dtype, name, *switches)))


def networks_name(request: Request) -> str:
    """The files whose networks are in a step."""
    m = request.model
    further = (len(request.controlnets.nets), len(request.ip_adapters.adapters), bool(request.sparsectrl.path))
    return " ".join([Path(m.personalised or m.base).name, Path(m.motion_module).name, *map(str, further)])


@dataclass
class Stopwatch:
    """Seconds between the steps of a clip, and of a frame that is decoded and written."""

    device: torch.device
    times: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def step(self) -> None:
        """A step is done, also on a GPU, which answers before it is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def per_step(self) -> float | None:
        """The median of all steps but the first, which sets up; None without a step."""
        if not self.times:
            return None
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(gaps) if gaps else self.times[0] - self.began

    def per_frame(self, frames: int) -> float:
        """Of what happened since the last step."""
        return (time.perf_counter() - (self.times[-1] if self.times else self.began)) / frames


def remember(request: Request, watch: Stopwatch, dtype: torch.dtype) -> None:
    """Write what the clips of a batch have taken. A cache that cannot be written is none."""
    if (seconds := watch.per_step()) is None:
        return
    size, name = request.size, shape_class(request, watch.device, dtype)
    measured = {
        "step": seconds,
        "frame": watch.per_frame(size.num_frames * clips_together(request)),
        "pixels": _pixels(request),
    }
    known = _read()
    sizes = {**known.pop(name, {}), str(work_of(request)): measured}
    known[name] = dict(list(sizes.items())[-MOST:])
    write_cache(REMEMBERED, known, most=MOST)


def estimate(request: Request, steps: int, device: torch.device, dtype: torch.dtype) -> tuple[float, bool] | None:
    """Seconds that a clip will take, and whether a clip of this size was measured; None for an unknown class.

    Of another size the nearest one's time grows with the number of latent pixels.
    """
    sizes, work = _read().get(shape_class(request, device, dtype)), work_of(request)
    if not sizes:
        return None
    nearest = min(sizes, key=lambda size: abs(int(size) - work))
    known, factor = sizes[nearest], work / int(nearest)
    per_frame = known["frame"] * _pixels(request) / known["pixels"]
    return steps * known["step"] * factor / clips_together(request) + request.size.num_frames * per_frame, int(
        nearest
    ) == work


def _pixels(request: Request) -> int:
    return (request.size.height or 512) * (request.size.width or 512)


def _read() -> dict[str, dict[str, Any]]:
    """What is remembered; nothing where the file is missing or damaged."""
    try:
        found = read_cache(REMEMBERED)
        for sizes in found.values():
            for work, known in sizes.items():
                if int(work) <= 0 or not all(known[key] > 0 for key in ("step", "frame", "pixels")):
                    return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found
