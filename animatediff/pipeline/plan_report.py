"""What `animate.py --plan` prints: memory and time of every entry, before anything is loaded."""

from __future__ import annotations

import torch

from animatediff.config.prompt_yaml import RunConfig
from animatediff.config.request import Request
from animatediff.pipeline.device import pick_device, pick_dtype
from animatediff.pipeline.fit import Fit, budget_of, fit, plan_request, sizes_of
from animatediff.pipeline.headers import Checked, check_requests
from animatediff.pipeline.rehearse import rehearse
from animatediff.pipeline.run_folder import recorded_dtype
from animatediff.pipeline.tagged_loras import with_tagged_loras
from animatediff.pipeline.timings import estimate


def plan_lines(config: RunConfig, *, device: str = "auto", dtype: str | None = None) -> list[str]:
    """A paragraph for each entry: its clips, their memory, the switches, their time.

    Raises:
        UserError: anything wrong with the config or its files, or a clip that cannot fit.
    """
    target = pick_device(device)
    weights_dtype = pick_dtype(dtype or recorded_dtype(config.provenance, target), target)
    checked = check_requests(with_tagged_loras(config.entries))
    rehearse(checked)
    return [_paragraph(entry, target, weights_dtype) for entry in checked]


def _paragraph(checked: Checked, device: torch.device, dtype: torch.dtype) -> str:
    request, clips = checked.request, len(checked.request.prompts.prompt)
    found = fit(checked, device, dtype)
    if found is None:
        found = Fit(request, plan_request(request, sizes=sizes_of(checked), device=device, dtype=dtype))
    size, budget = request.size, budget_of(request.memory, device)
    what = f"{size.num_frames} frames of {size.height}x{size.width}, {checked.steps} steps"
    kind = str(dtype).removeprefix("torch.")
    lines = [f"entry {request.output.name}: {clips} clip{'s' * (clips > 1)} of {what}, {device} {kind}"]
    lines += [f"  {row}" for row in str(found.plan).splitlines()]
    if budget is not None:
        lines.append(f"  {'may be used':<26}{budget / 1e6:10,.0f} MB")
    if device.type == "cpu" and budget is None:
        lines.append("  without max_memory freed memory is kept for speed: a step and decoding may take twice as much")
    lines += [f"  switch: {line}" for line in found.switches()]
    lines.append(f"  time: {_time(found.request, checked.steps, clips, device, dtype)}")
    return "\n".join(lines)


def _time(request: Request, steps: int, clips: int, device: torch.device, dtype: torch.dtype) -> str:
    known = estimate(request, steps, device, dtype)
    if known is None:
        return "unknown, as no clip of these networks was made here yet"
    seconds, same = known
    how = "as measured here" if same else "from a clip of another size here"
    return f"about {duration(seconds)} a clip, {duration(seconds * clips)} in all, {how}"


def duration(seconds: float) -> str:
    """Such as 4 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
