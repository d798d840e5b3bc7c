"""Say what weight files are and how to use them: `python scripts/doctor.py FILE…` (files or model folders).

`python scripts/doctor.py --gpu` shows which kernels this GPU uses, and times them again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from animatediff.checkpoints.files import file_sha256, read_state_dict
from animatediff.checkpoints.identify import FileInfo, identify, weight_files
from animatediff.config.networks import Distillation
from animatediff.utils import Parser, UserError, printable, run_main


def main() -> int:
    parser = Parser(description="Say what weight files are and how to use them.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="weight file or diffusers folder")
    parser.add_argument("--gpu", action="store_true", help="show which kernels this GPU uses, and time them again")
    args, status = parser.parse_args(), 0
    if args.gpu:
        from animatediff_kernels import calibration

        calibration.show(remeasure=True)
    elif not args.files:
        raise UserError("got no file, expected weight files, model folders or --gpu")
    for path in args.files:
        try:
            info = identify(path)
            report = describe(info, Values.of(path))
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            status = 2
        else:
            print(report)
    return status


@dataclass
class Values:
    """Totals over all weights of a file or folder."""

    nans: int = 0
    infinities: int = 0
    size: int = 0  # bytes

    @classmethod
    def of(cls, path: Path) -> Values:
        total = cls()
        for file in weight_files(path):
            for tensor in read_state_dict(file).tensors.values():
                one_byte_float = tensor.is_floating_point() and tensor.itemsize == 1  # of these torch cannot ask
                values = tensor.float() if one_byte_float else tensor
                total.nans += int(values.isnan().sum())
                total.infinities += int(values.isinf().sum())
                total.size += tensor.nbytes
        return total


def _sampling(needs: Distillation) -> str:
    fixed = f"{needs.name}: sampler {needs.sampler}, {needs.timestep_spacing} timestep_spacing, {needs.steps} steps"
    return f"{fixed}, guidance_scale {needs.guidance_scale:g} (chosen where the config does not say)"


def describe(info: FileInfo, values: Values) -> str:
    length = f"{info.positional_length} frames" if info.positional_length else "none in the file"
    rows = [
        ("kind", f"{info.kind}: {info.summary}"),
        ("version", info.version or "not told by the file"),
        ("base", info.base),
        ("dtype", info.dtype),
        ("parameters", f"{info.num_parameters:,} in {info.num_tensors:,} tensors, {values.size / 1e6:,.1f} MB"),
        ("sha256", file_sha256(info.path)),
        ("NaN / Inf", f"{values.nans:,} / {values.infinities:,}"),
        ("positions", f"positional encoding: {length}"),
        *(("metadata", f"{key} = {value}") for key, value in sorted(info.metadata.items())),
        *(("schedule", f"{name} = {value}") for name, value in info.schedule.items()),
        *(("note", note) for note in info.notes),
        *([("sampling", _sampling(info.distillation))] if info.distillation else []),
        ("needs", info.needs or "-"),
        *(("config", line) for line in info.config_line.splitlines()),
    ]
    lines = [str(info.path), *(f"  {name:<11} {value}" for name, value in rows)]
    return "\n".join(printable(line, longest=500).replace("\n", "\\n") for line in lines)


if __name__ == "__main__":
    run_main(main)
