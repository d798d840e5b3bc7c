"""Say what weight files are and how to use them, and what clips were made with: `python scripts/doctor.py FILE…`
(files, model folders or folders of frames).

`python scripts/doctor.py --gpu` shows which kernels this GPU uses, and times them again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from animatediff.checkpoints.files import file_sha256, read_state_dict
from animatediff.checkpoints.find_models import as_option
from animatediff.checkpoints.identify import FileInfo, identify, weight_files
from animatediff.config.networks import Distillation
from animatediff.config.settings import dump_yaml
from animatediff.config.spellings import NamedFile, as_values, files
from animatediff.pipeline.remembered import is_clip, place_now, read_remembered
from animatediff.utils import Parser, UserError, printable, run_main, told


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Say what weight files are and how to use them, and what clips were made with.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="weight file, diffusers folder or clip")
    parser.add_argument("--gpu", action="store_true", help="show which kernels this GPU uses, and time them again")
    args, status = parser.parse_args(argv), 0
    if args.gpu:
        from animatediff_kernels import calibration

        calibration.show(remeasure=True)
    elif not args.files:
        raise UserError("got no file, expected weight files, model folders, clips or --gpu")
    for path in args.files:
        try:
            report = describe_path(path)
        except UserError as error:
            print(f"error: {told(error)}", file=sys.stderr)
            status = 2
        else:
            print(report)
    return status


def describe_path(path: Path) -> str:
    """Raises: UserError where it is neither weights nor a clip."""
    of_run = (path / "config.yaml").is_file() and (path / "sample").is_dir()
    return describe_clip(path) if is_clip(path) or of_run else describe(identify(path), Values.of(path))


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
    return _table(info.path, rows)


def describe_clip(path: Path) -> str:
    """Who made it, the settings, and the files that it was made with: whether they are here, and where."""
    known = read_remembered(path)
    request = known.request()
    prompts = request.per_prompt() if request.prompts.prompt else []
    on = f" on {', '.join(known.made_on.values())}" if known.made_on else ""
    rows = [("made by", known.program + on)]
    for prompt, negative, seed in prompts:
        rows += [("prompt", str(prompt)), ("negative", str(negative)), ("seed", "drawn" if seed == -1 else str(seed))]
    values = dump_yaml(as_values(request, changed_only=True)).splitlines()
    rows += [("" if number else "settings", line) for number, line in enumerate(values)]
    for file in files(request).values():
        if sha256 := known.hashes.get(file.path):
            rows.append(("file", f"{file.option} = {file.path}"))
            rows += [("  sha256", sha256), ("  now", _where(file, sha256, path.parent))]
    rows += [("needs", f"{w.option}: {w.name} {w.digits and f'(hash {w.digits})'}") for w in known.wanted()]
    rows += [("unread", what) for what in (known.foreign.without if known.foreign else ())]
    return _table(path, rows)


def _where(file: NamedFile, sha256: str, beside: Path) -> str:
    try:
        moved = place_now(file, sha256, beside)
    except UserError as error:
        return str(error)
    return f"moved to {as_option(moved)}" if moved else "there, unchanged"


def _table(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = [str(path), *(f"  {name:<11} {value}" for name, value in rows)]
    return "\n".join(printable(line, longest=500).replace("\n", "\\n") for line in lines)


if __name__ == "__main__":
    run_main(main)
