"""The folders that the page knows: which weight files it offers, which paths it takes, and where uploads are kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from animatediff.checkpoints.files import file_sha256
from animatediff.checkpoints.identify import FileInfo, identify
from animatediff.checkpoints.known_files import REPOSITORY, find_file
from animatediff.config.request import Request
from animatediff.config.spellings import files
from animatediff.config.values import PICTURES, SOUND
from animatediff.media.video import PICTURE_SUFFIXES, VIDEO_SUFFIXES, read_video
from animatediff.page.fields import Field, sentence
from animatediff.utils import UserError

ASSETS, EXAMPLES = REPOSITORY / "animatediff/assets", REPOSITORY / "configs"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
MEDIA_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, ".gif", ".apng")
FOLDERS = {  # of models/, as the README and the configs lay it out: what lies there is offered, even if it does not fit
    "model.base": "StableDiffusion",
    "model.personalised": "DreamBooth_LoRA",
    "model.motion_module": "Motion_Module",
    "model.loras": "DreamBooth_LoRA",
    "model.motion_loras": "MotionLoRA",
    "controlnets.nets": "ControlNet",
    "sparsectrl.path": "SparseCtrl",
    "ip_adapters.adapters": "IP-Adapter",
    "finish.upscaler": "ESRGAN",
    "finish.interpolator": "RIFE",
}


class Places:
    """What may be named on the page.

    Args:
        models: the folder of weight files; none is fine.
        output: where clips, and what was uploaded for them, are kept.
    """

    def __init__(self, models: str | Path, output: str | Path):
        self.models, self.output = Path(models), Path(output)
        self.uploads = self.output / "inputs"
        self._known: dict[str, tuple[tuple[int, int], FileInfo | str]] = {}
        try:
            self.uploads.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.uploads} ({error.strerror}): choose another --output-dir")\
                from None  # fmt: skip
        self.scan()

    # ---- weight files ---------------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Look for weight files; those that are known already are not read again."""
        found: dict[str, tuple[tuple[int, int], FileInfo | str]] = {}
        for path in (*_weights(self.models), *_weights(ASSETS)):
            try:
                name, stat = self.shown(path), path.stat()
            except OSError:  # a link to what is gone
                continue
            stamp = (stat.st_size, stat.st_mtime_ns)
            if self._known.get(name, (None,))[0] == stamp:
                found[name] = self._known[name]
                continue
            try:
                found[name] = (stamp, identify(path))
            except UserError as error:
                found[name] = (stamp, str(error))
        self._known = found

    def shown(self, path: Path) -> str:
        """A path as configs name it: from the current folder or the repository, if it is in there."""
        for root in (Path.cwd(), REPOSITORY):
            if path.absolute().is_relative_to(root):
                return path.absolute().relative_to(root).as_posix()
        return str(path.absolute())

    def offers(self, field: Field) -> list[tuple[str, str]]:
        """(what is shown, path) of the files for a field, those that fit first; the first stands for none."""
        assert field.kind is not None
        folder = FOLDERS.get(field.option)
        fitting, other = [], []
        for path, (_, info) in sorted(self._known.items()):
            fits = isinstance(info, FileInfo) and info.kind in field.kind.kinds
            inside = folder and Path(path).absolute().is_relative_to((self.models / folder).absolute())
            if inside and not field.kind.kinds:  # what has no kinds is told by whoever reads it
                fitting.append((Path(path).name, path))
            elif fits:
                fitting.append((f"{Path(path).name} · {_what(info)}", path))
            elif inside:
                reason = _what(info) if isinstance(info, FileInfo) else "cannot be read"
                other.append((f"✕ {Path(path).name} · {reason}", path))
        return [("none", ""), *fitting, *other]

    # ---- what may be asked for ------------------------------------------------------------------------------------

    def allows(self, path: str | Path, *, media: bool) -> bool:
        """Whether a path lies in a folder for its kind, whatever is there; `..` never does.

        Pictures, clips and sound may lie where clips and uploads do; weights, programs and configs may not.
        """
        if ".." in Path(path).parts:
            return False
        roots = [root.absolute() for root in (self.models, ASSETS, EXAMPLES, *([self.output] if media else []))]
        return any(place.is_relative_to(root) for place in (Path(path).absolute(), REPOSITORY / path) for root in roots)

    def check(self, request: Request) -> None:
        """Raises: UserError, a line for each file of a request that lies elsewhere."""
        lines = []
        for file in files(request).values():
            media = file.kind in (PICTURES, SOUND)
            if not self.allows(file.path, media=media):
                folders = f"{self.models} or {self.output}" if media else self.models
                lines.append(f"{file.called}: got {file.path}, expected a file in {folders}: put it there")
        if lines:
            raise UserError("\n".join(lines))

    def find_media(self, path: str) -> Path | None:
        """A picture or clip that settings name, if it is there and may be asked for."""
        found = (
            find_file(path) if self.allows(path, media=True) and Path(path).suffix.lower() in MEDIA_SUFFIXES else None
        )
        return found if found and found.is_file() else None

    def clips(self, most: int) -> list[Path]:
        """What was made, the newest first: files, and folders of pictures."""
        made: dict[Path, float] = {}
        for path in self.output.glob("*/sample/*"):
            pictures = path.is_dir() and any(path.glob("*.png"))
            if not path.name.startswith(".") and (pictures or path.suffix.lower() in MEDIA_SUFFIXES):
                with suppress(OSError):  # removed meanwhile, or a link to what is gone
                    made[path] = path.stat().st_mtime
        return sorted(made, key=made.__getitem__, reverse=True)[:most]

    # ---- uploads --------------------------------------------------------------------------------------------------

    def keep(self, upload: str | Path) -> str:
        """Keep an uploaded picture or clip by its content, so that settings can name it later; returns its path.

        Raises:
            UserError: it is neither.
        """
        upload = Path(upload)
        name, suffix = upload.name, upload.suffix.lower()
        if suffix not in MEDIA_SUFFIXES:
            raise UserError(f"got {name}, expected a picture or clip ({', '.join(MEDIA_SUFFIXES)}): choose another")
        kept = self.uploads / f"{file_sha256(upload)[:20]}{suffix}"
        if not kept.exists():
            try:
                read_video(upload, most=1)
            except UserError as error:
                raise UserError(str(error).replace(str(upload), name)) from None
            temporary = kept.with_name(f".{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}{suffix}")
            shutil.copyfile(upload, temporary)
            os.replace(temporary, kept)
        return self.shown(kept)

    def keep_all(self, fields: Mapping[str, Field], filled: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
        """Put the paths of kept files in place of those of uploads; what is wrong with them, by field, and their names.

        A name is what the file was called before it was kept, by the path that it is kept under.
        """
        found, names = {}, {}
        for name, field in fields.items():
            value = filled.get(name)
            if field.takes not in ("media", "medias") or not value:
                continue
            try:
                uploads = [value] if isinstance(value, str) else value
                kept = [self.keep(upload) for upload in uploads]
                names |= {path: Path(upload).name for path, upload in zip(kept, uploads, strict=True)}
                filled[name] = kept if field.takes == "medias" else kept[0]
            except UserError as error:
                found[name] = sentence(str(error))
                filled[name] = None
        return found, names


def _weights(folder: Path) -> list[Path]:
    """Weight files in a folder, however deep; a folder that is one model is one of them."""
    found = []
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            model = any((path / name).exists() for name in ("model_index.json", "config.json", "unet"))
            found += [path] if model else _weights(path)
        elif path.suffix in WEIGHT_SUFFIXES:
            found.append(path)
    return found


def _what(info: FileInfo) -> str:
    """What a file is, in a few words."""
    base = info.base.removeprefix("SD 1.x layout of ") if "told" not in info.base else ""
    base = "" if base == "unknown" else base
    version = info.version if info.kind.startswith(("motion-mod", "motion-ad", "sparse")) else ""
    summary = info.summary.removeprefix("a ").removeprefix("an ").removesuffix(" in one file")
    told = (" ".join(part for part in (summary, version) if part), "" if base in summary else base, info.dtype)
    return ", ".join(part for part in told if part)
