"""Time one guided denoising step of the SD-1.5-sized video UNet, or decoding by its VAE, with random weights.

python kernels/benchmarks/step.py --device cpu --size 256        # beside diffusers, if it is installed
python kernels/benchmarks/step.py --device cuda --size 512
python kernels/benchmarks/step.py --device cpu --part decode --frames 2 --size 256

The networks run in turns, with the same weights and inputs: all in one process on CUDA, each in its own on the CPU,
where memory is only known of a process. There ours has the allocator setting of our command line; ours-torch is
without it and without fast paths, and diffusers-tuned is diffusers given that setting and oneDNN's products. A
process's second run is timed. The least of `--repeat` runs counts. The ratio is of seconds on CUDA, of
CPU seconds on the CPU, to diffusers run eagerly. The motion module's GroupNorm is pooled over frames, as diffusers
has it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from animatediff_kernels import use_backend
from animatediff_kernels.cpu import fast_products
from floor import breakdown
from run import RESULTS, device_label, provenance, write_rows
from shapes import CONFIG, TEXT_TOKENS
from torch import Tensor, nn

from animatediff.checkpoints.keymaps import motion_to_official
from animatediff.config.networks import MotionConfig, VAEConfig
from animatediff.models.motion import positional_encoding
from animatediff.models.unet import UNet
from animatediff.models.vae import VAE
from animatediff.pipeline.compiled import compile_unet
from animatediff.utils import keep_freed_memory

NETWORKS = ("ours", "diffusers")
ON_CPU = ("ours-torch", "ours-compiled", "diffusers-tuned", "diffusers-compiled")  # beside them
ON_CUDA = ("ours-torch", "ours-triton", "ours-compiled", "diffusers-compiled")  # beside them
ALL = tuple(dict.fromkeys(NETWORKS + ON_CPU + ON_CUDA))
BACKENDS = {
    "": "auto",
    "torch": "torch",
    "triton": "triton",
    "compiled": "auto",
    "tuned": "auto",
}  # of ours, by what follows the name
CUDA_STEPS = 10  # per run; the CPU takes one
KEY = ("part", "network", "device", "size", "frames", "dtype", "threads")
COLUMNS = (*KEY, "seconds", "cpu_seconds", "peak_mb", "ratio", "error", "repeat", "versions", "commit", "date")
Timed = dict[str, float]
Run = Callable[[str], tuple[Timed, Tensor]]


class Step(NamedTuple):
    run: Callable[[], Tensor]
    weights: int  # bytes of the network


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.breakdown:
        return breakdown(make_step(args, "ours").run, torch.device(args.device), getattr(torch, args.dtype))
    if args.worker:
        if args.worker in ("ours", "ours-compiled", "diffusers-tuned"):
            keep_freed_memory()
        step = make_step(args, args.worker)
        step.run()  # which compiles, where that is asked for, and makes room for what is freed and used again
        timed, out = time_step(args, step)
        torch.save(out, args.output)
        return print(json.dumps(timed))
    networks = tuple(args.networks or NETWORKS + (ON_CUDA if args.device.startswith("cuda") else ON_CPU))
    if not importlib.util.find_spec("diffusers"):
        networks = tuple(n for n in networks if n.startswith("ours"))
        print("diffusers is not installed: ours alone (pip install diffusers for the comparison)")
    run = run_here(args, networks) if args.device.startswith("cuda") else run_apart(args)
    runs, outputs = {network: [] for network in networks}, {}
    for repeat in range(args.repeat):
        for network in networks if repeat % 2 == 0 else reversed(networks):
            timed, outputs[network] = run(network)
            runs[network].append(timed)
            print(f"{network}: {timed}", flush=True)
        rows = [summary(args, network, runs, outputs) for network in networks]
        write_rows(args.results / "step.csv", rows, KEY, COLUMNS)
    printed = ("network", "seconds", "cpu_seconds", "peak_mb", "ratio", "error")
    for row in rows:
        print(" ".join(f"{name} {row[name]}" for name in printed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=("step", "decode"), default="step")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="by default bfloat16 on CUDA")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--breakdown", action="store_true", help="print our step's time by kind of work, and stop")
    parser.add_argument("--networks", nargs="+", choices=ALL, help="by default all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step.csv")
    parser.add_argument("--worker", choices=NETWORKS + ON_CPU, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def run_apart(args: argparse.Namespace) -> Run:
    """Each run in a process of its own."""

    def run(network: str) -> tuple[Timed, Tensor]:
        options = [f"--{name}={getattr(args, name)}" for name in ("part", *KEY[2:])]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "out.pt"
            command = [sys.executable, __file__, *options, "--worker", network, "--output", str(output)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1]), torch.load(output)

    return run


def run_here(args: argparse.Namespace, networks: Sequence[str]) -> Run:
    """All runs in this process. Two steps of each, which time kernels and then compile, do not count."""
    steps = {network: make_step(args, network) for network in networks}
    for step in steps.values():
        step.run()
        step.run()
    return lambda network: time_step(args, steps[network])


def make_step(args: argparse.Namespace, name: str) -> Step:
    whose, _, how = name.partition("-")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    make = {"ours": our_network, "diffusers": diffusers_network}
    make_vae = {"ours": our_vae, "diffusers": diffusers_vae}
    network = (make if args.part == "step" else make_vae)[whose]()
    network.to(device, dtype)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if how == "compiled" and isinstance(network, UNet):
        compile_unet(network, tell=lambda line: print(line, file=sys.stderr))
    elif how == "compiled":
        network.compile()
    side = args.size // 8
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, args.frames, 4, side, side, generator=generator).to(device, dtype)
    text = torch.randn(2, TEXT_TOKENS, CONFIG.context_dim, generator=generator).to(device, dtype)
    texts = text.repeat_interleave(args.frames, dim=0)  # diffusers has a row per frame
    t = torch.tensor([500, 500], device=device)

    @torch.no_grad()
    def decode() -> Tensor:
        if whose == "diffusers":
            with fast_products(latents[0], network.decoder.conv_in.weight) if how == "tuned" else nullcontext():
                return network.decode(latents[0]).sample
        with use_backend(BACKENDS[how]):
            return network.decode(latents[0])

    @torch.no_grad()
    def run() -> Tensor:
        if args.part == "decode":
            return decode()
        if whose == "diffusers":
            with fast_products(latents, network.conv_in.weight) if how == "tuned" else nullcontext():
                return network(latents.transpose(1, 2), t, encoder_hidden_states=texts).sample.transpose(1, 2)
        with use_backend(BACKENDS[how]):
            return network(latents, t, text)

    return Step(run, sum(p.nbytes for p in network.parameters()))


def time_step(args: argparse.Namespace, step: Step) -> tuple[Timed, Tensor]:
    """Seconds, CPU seconds and peak megabytes (on CUDA: of this network), and the output."""
    cuda = args.device.startswith("cuda")
    steps = CUDA_STEPS if cuda else 1
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        out = step.run()
    if cuda:
        torch.cuda.synchronize()
    timed = {"seconds": (time.perf_counter() - wall) / steps, "cpu_seconds": (time.process_time() - cpu) / steps}
    most = torch.cuda.max_memory_allocated() - before + step.weights if cuda else peak_memory_of_process()
    return timed | {"peak_mb": most / 1e6}, out.float().cpu()


def peak_memory_of_process() -> int:
    """Bytes."""
    import resource  # not there on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def summary(
    args: argparse.Namespace, network: str, runs: dict[str, list], outputs: dict[str, Tensor]
) -> dict[str, str]:
    least = {name: min(run[name] for run in runs[network]) for name in runs[network][0]}
    row = {"part": args.part, "network": network, "device": device_label(args.device), "dtype": args.dtype}
    row |= {"size": str(args.size), "frames": str(args.frames), "repeat": str(len(runs[network]))}
    row |= {name: f"{value:.4g}" for name, value in least.items()} | {"ratio": "", "error": ""}
    if network.startswith("ours") and "diffusers" in runs:
        clock = "seconds" if args.device.startswith("cuda") else "cpu_seconds"
        theirs = outputs["diffusers"]
        error = ((outputs[network] - theirs).norm() / theirs.norm()).item()
        right = error < (1e-5 if args.dtype == "float32" else 6e-2)  # of two that round on their own
        row["error"] = f"{error:.1e}"
        row["ratio"] = f"{min(run[clock] for run in runs['diffusers']) / least[clock]:.3f}" if right else ""
    return row | provenance() | {"threads": str(args.threads), "date": datetime.date.today().isoformat()}


def our_network() -> nn.Module:
    with torch.device("meta"):
        unet = UNet(CONFIG.with_motion(replace(CONFIG.motion or MotionConfig(), norm_over_frames=True)))
    return fill(unet.to_empty(device="cpu")).eval()


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
    unet.to_empty(device="cpu")
    for name, table in unet.named_buffers():
        assert name.endswith("pos_embed.pe"), name
        table.copy_(positional_encoding(table.shape[1], table.shape[2], table.device, table.dtype)[None])
    return fill(unet, official).eval()


def our_vae() -> nn.Module:
    return fill(VAE(VAEConfig())).eval()


def diffusers_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    config, levels = VAEConfig(), len(VAEConfig().block_out_channels)
    vae = AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    return fill(vae).eval()


def official(name: str) -> str:
    return motion_to_official(name) if "motion_modules." in name else name


@torch.no_grad()
def fill(network: nn.Module, rename: Callable[[str], str] = str) -> nn.Module:
    """Weights that depend on a parameter's name (`rename`d) and shape alone, and keep activations near unit size."""
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(rename(name).encode()))
        if parameter.dim() == 1:
            parameter.uniform_(-0.1, 0.1, generator=generator).add_("norm" in name and name.endswith("weight"))
        else:
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
    return network


if __name__ == "__main__":
    main()
