"""Train a grid of variants on Shapes, the toy data set, and compare them.   Repeat the command to go on.

`python scripts/ablate.py --grid configs/eval/ablation.yaml [--quick] [--jobs 2]`
"""

from __future__ import annotations

import argparse

from animatediff.lab.ablation import load_grid, run_grid
from animatediff.utils import Parser, UserError, run_main


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, help="a YAML such as configs/eval/ablation.yaml")
    parser.add_argument("--quick", action="store_true", help="the grid's smaller values; its table says which")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, each on one CPU core (1)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (auto)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"got --jobs {args.jobs}, expected at least 1")
    print(run_grid(load_grid(args.grid, quick=args.quick), jobs=args.jobs, device=args.device))


if __name__ == "__main__":
    run_main(main)
