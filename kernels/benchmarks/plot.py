"""Draw the CSVs: the roofline of every operation, and bars of how long each provider takes.

python kernels/benchmarks/plot.py --device "NVIDIA H100 80GB HBM3" --output kernels/benchmarks/results

Needs matplotlib: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from ops import OPS
from run import RESULTS, Row

from animatediff.utils import UserError, run_main

INK = {"torch": "#1f77b4", "triton": "#d62728"}  # ours; everyone else is grey


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="as the CSVs name it; by default the only one there")
    parser.add_argument("--clip", default="16f-512")
    parser.add_argument("--mode", default="fwd")
    parser.add_argument("--dtype", help="by default the only one measured there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = select(read_rows(RESULTS), args.device, args.clip, args.mode, args.dtype)
    for path in draw(rows, args.output):
        print(path)


def read_rows(folder: Path) -> list[Row]:
    """Rows of all operations."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        if path.stem in OPS:
            with path.open(newline="", encoding="utf-8") as file:
                rows += csv.DictReader(file)
    return rows


def select(rows: list[Row], device: str | None, clip: str, mode: str, dtype: str | None) -> list[Row]:
    """The right results of one device, clip, mode and dtype. Raises UserError where they are not of one or none."""
    wanted = {"device": device, "clip": clip, "mode": mode, "dtype": dtype}
    given = {name: value for name, value in wanted.items() if value}
    chosen = [r for r in rows if r["right"] == "yes" and all(r[name] == value for name, value in given.items())]
    if not chosen:
        raise UserError(f"got no right results of {', '.join(given.values())}: measure them with run.py")
    only(chosen, "device")
    only(chosen, "dtype")
    return chosen


def only(rows: list[Row], name: str) -> None:
    """Raises UserError where a column has several values."""
    values = {row[name] for row in rows}
    if len(values) != 1:
        raise UserError(f"got results of {len(values)} {name}s, expected one: --{name} {' | '.join(sorted(values))}")


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write roofline.png, and for each operation bars_<op>.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    peak, bandwidth = (max(float(row[name]) for row in rows) for name in ("ceiling_tflops", "ceiling_gbps"))
    products = [row for row in rows if float(row["tflops"]) > 0]
    knee = 1e3 * peak / bandwidth  # from where on the products are the limit
    ends = [knee / 10, knee, max([10 * knee, *map(intensity, products)])]
    axis.plot(ends, [min(peak, x * bandwidth / 1e3) for x in ends], color="black")
    for row in products:
        axis.scatter(intensity(row), float(row["tflops"]), s=18, color=INK.get(row["provider"], "#aaaaaa"))
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=title(rows))
    paths = [folder / "roofline.png"]
    figure.savefig(paths[0], dpi=130)
    plt.close(figure)

    for op in sorted({row["op"] for row in rows}):
        shapes = list(dict.fromkeys(row["sizes"] for row in rows if row["op"] == op))
        figure, axes = plt.subplots(
            len(shapes), 1, figsize=(9, 1.4 * len(shapes) + 0.6), squeeze=False, layout="constrained"
        )
        for axis, sizes in zip(axes[:, 0], shapes, strict=True):
            bars = [row for row in rows if (row["op"], row["sizes"]) == (op, sizes)]
            colours = [INK.get(row["provider"], "#aaaaaa") for row in bars]
            axis.barh([row["provider"] for row in bars], [float(row["ms"]) for row in bars], color=colours)
            axis.set_title(sizes, fontsize=8, loc="left")
            axis.tick_params(labelsize=7)
        axes[-1, 0].set_xlabel("ms")
        figure.suptitle(f"{op}: {title(rows)}", fontsize=9)
        paths.append(folder / f"bars_{op}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def intensity(row: Row) -> float:
    return 1e3 * float(row["tflops"]) / float(row["gbps"])


def title(rows: list[Row]) -> str:
    return f"{rows[0]['device']}, {rows[0]['clip']}, {rows[0]['mode']}, {rows[0]['dtype']}; blue and red: this package"


if __name__ == "__main__":
    run_main(main)
