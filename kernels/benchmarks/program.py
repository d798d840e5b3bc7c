"""From the command line to the clip on the disk: seconds of a whole process, of bundled configs in turns.

python kernels/benchmarks/program.py

Wall time with all cores, which must be idle, of `scripts/animate.py` with one prompt: the median and the least of
`--repeat` runs after one that does not count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import RESULTS, device_label, provenance, write_rows

ROOT = Path(__file__).parents[2]
CONFIGS = ("shapes-four-steps", "shapes")
PROMPT = "a large green star spinning clockwise on a beige background"
KEY = ("config", "device", "threads")
COLUMNS = (*KEY, "median_s", "least_s", "torch_s", "repeat", "versions", "commit", "date")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="names in configs/animate")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of program.csv")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (*args.configs, "")}
    for _ in range(args.repeat + 1):
        for name, runs in seconds.items():
            runs.append(run(name))
    torch_s = statistics.median(seconds.pop("")[1:])
    rows = []
    for name, (_, *runs) in seconds.items():
        took = {"median_s": statistics.median(runs), "least_s": min(runs), "torch_s": torch_s}
        row = {"config": name, "device": device_label("cpu"), "repeat": str(args.repeat)}
        rows.append(row | {key: f"{value:.2f}" for key, value in took.items()} | provenance())
        print(
            f"{name}: median {took['median_s']:.2f} s, least {took['least_s']:.2f} s, importing torch {torch_s:.2f} s"
        )
    write_rows(args.results / "program.csv", rows, KEY, COLUMNS)


def run(config: str) -> float:
    """Seconds of a process that makes a clip, or with no config imports torch alone."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "clips"
        program = [str(ROOT / "scripts/animate.py"), "--config", str(ROOT / f"configs/animate/{config}.yaml")]
        command = [*program, "--prompt", PROMPT, "--output-dir", str(made)] if config else ["-c", "import torch"]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, capture_output=True)
        seconds = time.perf_counter() - start
        if config and not any(made.rglob("*.gif")):
            raise SystemExit(f"got no clip of {config}, expected one in {made}")
        return seconds


if __name__ == "__main__":
    main()
