"""Repeat the paper's claims on Shapes, the toy data set: train what is missing, measure, and write the tables.

`python scripts/reproduce.py [--quick] [--jobs 2]`        repeat the command to go on; docs/reproduction.md has results
`python scripts/reproduce.py --tables transfer adapter`   some of the tables, and the trainings that they need
"""

from __future__ import annotations

import argparse
from pathlib import Path

from animatediff.lab.reproduction import load_reproduction, run_reproduction
from animatediff.utils import Parser, UserError, run_main

CONFIG = str(Path(__file__).resolve().parents[1] / "configs/eval/reproduction.yaml")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=CONFIG, help="what to train and to measure (configs/eval/reproduction.yaml)"
    )
    parser.add_argument("--tables", nargs="+", default=[], metavar="NAME", help="by default all")
    parser.add_argument("--quick", action="store_true", help="fewer steps and captions; the tables say how many")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each on one CPU core (1)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (auto)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"got --jobs {args.jobs}, expected at least 1")
    plan = load_reproduction(args.config, quick=args.quick, tables=args.tables)
    print(run_reproduction(plan, jobs=args.jobs, device=args.device, quick=args.quick))
    print(Path(plan.output_dir) / "tables.md")


if __name__ == "__main__":
    run_main(main)
