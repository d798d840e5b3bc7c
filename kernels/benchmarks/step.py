"""Time one guided denoising step of the SD-1.5-sized video UNet with random weights, operation by operation.

python kernels/benchmarks/step.py --device cpu --size 256        # beside diffusers, if it is installed
python kernels/benchmarks/step.py --device cuda --size 512

Every network runs in a process of its own, in turns, with the same weights, inputs and allocator; the least of
`--repeat` runs counts. The ratio is of seconds on CUDA, of CPU seconds on the CPU, to diffusers run eagerly. The motion
module's GroupNorm is pooled over frames, as diffusers has it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from animatediff_kernels import use_backend
from floor import breakdown
from run import RESULTS, device_label, provenance, write_rows
from shapes import CONFIG, TEXT_TOKENS
from torch import Tensor, nn

from animatediff.checkpoints.keymaps import motion_to_official
from animatediff.model_config import MotionConfig
from animatediff.models.motion import positional_encoding
from animatediff.models.unet import UNet

NETWORKS = ("ours", "diffusers")
ON_CUDA = ("ours-triton", "diffusers-compiled")  # beside them; ours alone asks `auto` and the environment
CUDA_STEPS = 10  # per run; the CPU takes one
KEY = ("network", "device", "size", "frames", "dtype", "threads")
COLUMNS = (*KEY, "seconds", "cpu_seconds", "peak_mb", "ratio", "error", "repeat", "versions", "commit", "date")


def main() -> None:
    args = parse()
    if args.worker:
        return work(args)
    networks = NETWORKS + (ON_CUDA if args.device.startswith("cuda") else ())
    if not importlib.util.find_spec("diffusers"):
        networks = tuple(n for n in networks if n.startswith("ours"))
        print("diffusers is not installed: ours alone (pip install diffusers for the comparison)")
    with tempfile.TemporaryDirectory() as folder:
        runs = {network: [] for network in networks}
        for repeat in range(args.repeat):
            for network in networks if repeat % 2 == 0 else reversed(networks):
                runs[network].append(run_worker(args, network, Path(folder)))
                print(f"{network}: {runs[network][-1]}", flush=True)
        outputs = {network: torch.load(Path(folder) / f"{network}.pt") for network in networks}
    rows = [summary(args, network, runs, outputs) for network in networks]
    write_rows(RESULTS / "step.csv", rows, KEY, COLUMNS)
    for row in rows:
        print(
            " ".join(
                f"{name} {row[name]}" for name in ("network", "seconds", "cpu_seconds", "peak_mb", "ratio", "error")
            )
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="by default bfloat16 on CUDA")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--breakdown", action="store_true", help="print our step's time by kind of work, and stop")
    parser.add_argument("--worker", choices=NETWORKS + ON_CUDA, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.breakdown:
        args.worker = "ours"
    return args


def run_worker(args: argparse.Namespace, network: str, folder: Path) -> dict[str, float]:
    options = [f"--{name}={getattr(args, name)}" for name in ("device", "dtype", "size", "frames", "threads")]
    command = [sys.executable, __file__, *options, "--worker", network, "--output", str(folder / f"{network}.pt")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(args: argparse.Namespace) -> None:
    """One network; prints what a step took. On CUDA a first step, which sets everything up, does not count."""
    torch.set_num_threads(args.threads)
    whose, _, how = args.worker.partition("-")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    network = {"ours": our_network, "diffusers": diffusers_network}[whose]()
    network.to(device, dtype)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if how == "compiled":
        network = torch.compile(network)
    side = args.size // 8
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, args.frames, 4, side, side, generator=generator).to(device, dtype)
    text = torch.randn(2, TEXT_TOKENS, CONFIG.context_dim, generator=generator).to(device, dtype)
    texts = text.repeat_interleave(args.frames, dim=0)  # diffusers has a row per frame
    t = torch.tensor([500, 500], device=device)

    @torch.no_grad()
    def step() -> Tensor:
        if whose == "ours":
            with use_backend("triton") if how == "triton" else nullcontext():
                return network(latents, t, text)
        return network(latents.transpose(1, 2), t, encoder_hidden_states=texts).sample.transpose(1, 2)

    if args.breakdown:
        return breakdown(step, device, dtype)
    steps = 1
    if device.type == "cuda":
        steps = CUDA_STEPS
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        out = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    used = {"seconds": (time.perf_counter() - wall) / steps, "cpu_seconds": (time.process_time() - cpu) / steps}
    torch.save(out.float().cpu(), args.output)
    on_device = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else None
    used["peak_mb"] = on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux: kilobytes
    print(json.dumps(used))


def summary(
    args: argparse.Namespace, network: str, runs: dict[str, list], outputs: dict[str, Tensor]
) -> dict[str, str]:
    least = {name: min(run[name] for run in runs[network]) for name in runs[network][0]}
    row = {"network": network, "device": device_label(args.device), "dtype": args.dtype}
    row |= {"size": str(args.size), "frames": str(args.frames), "repeat": str(args.repeat)}
    row |= {name: f"{value:.4g}" for name, value in least.items()} | {"ratio": "", "error": ""}
    if network.startswith("ours") and "diffusers" in runs:
        clock = "seconds" if args.device.startswith("cuda") else "cpu_seconds"
        theirs = outputs["diffusers"]
        error = ((outputs[network] - theirs).norm() / theirs.norm()).item()
        right = error < (1e-5 if args.dtype == "float32" else 3e-2)
        row["error"] = f"{error:.1e}"
        row["ratio"] = f"{min(run[clock] for run in runs['diffusers']) / least[clock]:.3f}" if right else ""
    return row | provenance() | {"threads": str(args.threads), "date": datetime.date.today().isoformat()}


def our_network() -> nn.Module:
    with torch.device("meta"):
        unet = UNet(CONFIG.with_motion(replace(CONFIG.motion or MotionConfig(), norm_over_frames=True)))
    return fill(unet.to_empty(device="cpu"), {name: name for name, _ in unet.named_parameters()}).eval()


def diffusers_network() -> nn.Module:
    from diffusers import UNetMotionModel

    with torch.device("meta"):
        unet = UNetMotionModel(
            block_out_channels=CONFIG.block_out_channels,
            cross_attention_dim=CONFIG.context_dim,
            num_attention_heads=CONFIG.num_heads,
            motion_num_attention_heads=CONFIG.num_heads,
            motion_max_seq_length=32,
            use_motion_mid_block=True,
        )
    names = {name: official(name) for name, _ in unet.named_parameters()}
    unet.to_empty(device="cpu")
    for name, table in unet.named_buffers():
        assert name.endswith("pos_embed.pe"), name
        table.copy_(positional_encoding(table.shape[1], table.shape[2], table.device, table.dtype)[None])
    return fill(unet, names).eval()


def official(name: str) -> str:
    return motion_to_official(name) if "motion_modules." in name else name


@torch.no_grad()
def fill(network: nn.Module, names: dict[str, str]) -> nn.Module:
    """Weights that depend on a parameter's official name and shape alone, and keep activations near unit size."""
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(names[name].encode()))
        if parameter.dim() == 1:
            parameter.uniform_(-0.1, 0.1, generator=generator).add_("norm" in name and name.endswith("weight"))
        else:
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
    return network


if __name__ == "__main__":
    main()
