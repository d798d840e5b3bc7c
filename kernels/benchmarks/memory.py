"""Planned memory against what processes take: `python kernels/benchmarks/memory.py --out …/results/memory.csv`

Every size has a process of its own, which samples a step and decodes, and is asked for its peak by Linux. Networks have
random weights and half of Stable Diffusion's widths; freed memory is given back, as with `--max-memory`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIZES = ((4, 128), (8, 128), (8, 192))  # frames, pixels of a side
SWITCHES = ({"chunk_tokens": 4096, "split_guidance": True, "vae_frames": 1}, {"weights": "float16"})
COLUMNS = ("frames", "side", "switches", "stage", "planned_mb", "measured_mb", "ratio")


def resident(what: str) -> int:
    """Bytes: VmRSS, or its peak VmHWM."""
    found = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) * 1024


def networks():
    from animatediff.config.networks import MOTION_VERSIONS, UNetConfig, VAEConfig
    from animatediff.pipeline.plan import Sizes

    unet = UNetConfig(block_out_channels=(160, 320, 640), attention_levels=(True, True, True))
    return Sizes(unet.with_motion(MOTION_VERSIONS["v3"]), VAEConfig(block_out_channels=(64, 128, 256, 256)))


def child(frames: int, side: int, switches: dict) -> dict[str, int]:
    """Peaks of both stages, and weights, in bytes above what is there before."""
    import torch

    from animatediff.config.memory_options import Memory
    from animatediff.models.chunks import set_chunk
    from animatediff.models.unet import UNet
    from animatediff.models.vae import VAE
    from animatediff.pipeline.memory import place
    from animatediff.utils import give_back_freed_memory

    give_back_freed_memory()
    sizes, memory, cpu = networks(), Memory(**switches), torch.device("cpu")
    parts = 1 if memory.split_guidance else 2
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resident("VmRSS")
    unet = place(UNet(sizes.unet).eval().requires_grad_(False), memory, cpu, torch.float32)
    vae = VAE(sizes.vae).eval().requires_grad_(False)
    set_chunk(unet, memory.chunk_tokens)
    gc.collect()
    found = {"weights": resident("VmRSS") - before}

    def peak(stage: str, function) -> None:
        CLEAR.write_text("5")
        with torch.no_grad():
            function()
        found[stage] = resident("VmHWM") - before

    x, text = torch.randn(parts, frames, 4, side // 8, side // 8), torch.randn(parts, 77, 768)
    z = torch.randn(min(memory.vae_frames, frames), 4, side // 8, side // 8)
    peak("a step", lambda: unet(x, torch.ones(parts), text))
    peak("decoding", lambda: vae.decode(z).clamp(-1, 1))
    return found


def measure(frames: int, side: int, switches: dict) -> list[dict]:
    """Rows of the table, from a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([frames, side, switches])]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured = json.loads(said.splitlines()[-1])
    from animatediff.config.memory_options import Memory
    from animatediff.pipeline.plan import plan_memory

    plan = plan_memory(networks(), frames=frames, height=side, width=side, memory=Memory(**switches))
    weights = sum(plan.weights.values())
    planned = {"weights": weights} | {stage: weights + plan.stages[stage] for stage in ("a step", "decoding")}
    said = " ".join(f"{name}={value}" for name, value in switches.items()) or "none"
    rows = []
    for stage, size in planned.items():
        numbers = f"{size / 1e6:.0f}", f"{measured[stage] / 1e6:.0f}", f"{measured[stage] / size:.3f}"
        rows.append(dict(zip(COLUMNS, (frames, side, said, stage, *numbers), strict=True)))
    return rows


def report(rows: list[dict], out: Path | None) -> None:
    """Print rows of the same columns, and write them as a CSV."""
    for row in rows:
        print("  ".join(f"{value!s:>10}" for value in row.values()))
    if out:
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a CSV")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    if not CLEAR.exists():
        sys.exit("error: needs Linux's count of the peak (/proc/self/clear_refs)")
    runs = [(*size, {}) for size in SIZES] + [(*SIZES[1], switches) for switches in SWITCHES]
    rows = [row for run in runs for row in measure(*run)]
    report(rows, args.out)


if __name__ == "__main__":
    main()
