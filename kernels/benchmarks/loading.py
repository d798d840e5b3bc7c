"""What loading takes: `python kernels/benchmarks/loading.py --out kernels/benchmarks/results/loading.csv`

A model of half of Stable Diffusion's widths as one file, in float32 and float16, with a motion module, is loaded in a
process of its own for every type of file and of weights, and Linux is asked for the peak. Seconds are of files that
have just been written, which the system has in memory; `read_s` is what it takes to read and hash them once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from memory import CLEAR, networks, report, resident

FILES, DTYPES = ("float32", "float16"), ("float32", "float16")
COLUMNS = ("file", "weights", "weights_mb", "peak_mb", "ratio", "load_s", "read_s")


def write_files(folder: Path, dtype: str) -> Path:
    """A folder with both files and a config that names them."""
    import torch

    from animatediff.config.networks import ScheduleConfig, TextConfig
    from animatediff.models.lora import LoRAStack
    from animatediff.models.text import TextEncoder
    from animatediff.models.tokenizer import Tokenizer
    from animatediff.models.unet import UNet
    from animatediff.models.vae import VAE
    from animatediff.pipeline.model import Model
    from animatediff.pipeline.save import save_model

    sizes, kind = networks(), getattr(torch, dtype)
    made = [UNet(sizes.unet), VAE(sizes.vae), TextEncoder(TextConfig(layers=2))]
    unet, vae, text = (network.to(kind) for network in made)
    return save_model(Model(unet, vae, text, Tokenizer(), ScheduleConfig(), LoRAStack(unet, text)), folder)


def child(folder: Path, dtype: str) -> dict[str, float]:
    """Bytes of the weights and the peak above what was there before, and seconds."""
    from animatediff.pipeline.pipeline import AnimateDiffPipeline
    from animatediff.utils import give_back_freed_memory

    give_back_freed_memory()
    before, start = resident("VmRSS"), time.perf_counter()
    CLEAR.write_text("5")
    pipe = AnimateDiffPipeline.from_config(folder / "config.yaml", device="cpu", dtype=dtype)
    for network in pipe.model.modules():  # weights that are mapped are read by their first use
        for weight in network.parameters():
            weight.sum()
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    weights = sum(p.nbytes for network in pipe.model.modules() for p in network.parameters())
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            hashlib.file_digest(opened, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(opened.read())
    return {"weights": weights, "peak": peak, "load": seconds, "read": time.perf_counter() - start}


def measure(folder: Path, file: str, dtype: str) -> dict[str, str]:
    command = [sys.executable, __file__, "--child", json.dumps([str(folder), dtype])]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    m = json.loads(said.splitlines()[-1])
    numbers = f"{m['weights'] / 1e6:.0f}", f"{m['peak'] / 1e6:.0f}", f"{m['peak'] / m['weights']:.3f}"
    return dict(zip(COLUMNS, (file, dtype, *numbers, f"{m['load']:.2f}", f"{m['read']:.2f}"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a CSV")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(Path(args.child[0]), args.child[1])))
        return
    if not CLEAR.exists():
        sys.exit("error: needs Linux's count of the peak (/proc/self/clear_refs)")
    rows = []
    with TemporaryDirectory() as folder:
        for file in FILES:
            written = write_files(Path(folder) / file, file)
            rows += [measure(written, file, dtype) for dtype in DTYPES]
    report(rows, args.out)


if __name__ == "__main__":
    main()
