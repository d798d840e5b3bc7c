"""What a stage is trained on: videos, pictures or Shapes, the toy data set, as latents and caption tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from animatediff.checkpoints.known_files import find_file
from animatediff.checkpoints.load import ImageModel, load_base
from animatediff.models.tokenizer import Tokenizer
from animatediff.models.vae import VAE
from animatediff.training.data.clips import ClipConfig, Clips, Series
from animatediff.training.data.images import ImageConfig, Images
from animatediff.training.data.reader import ClipReader
from animatediff.training.diffusion_stages import ClipSource
from animatediff.training.distributed import first_process_first
from animatediff.training.latents import Condition, LatentClips, StreamedClips, in_chunks, made_from, world_key
from animatediff.training.stage_config import Log
from animatediff.utils import UserError
from animatediff.world.series import World


@dataclass(frozen=True)
class Data:
    """One of three sources; `single_frames` draws one random frame of each clip.

    Raises:
        UserError: none, or more than one.
    """

    videos: ClipConfig | None
    images: ImageConfig | None
    world: World | None
    single_frames: bool
    seed: int
    condition: Condition | None = None  # what the stage sees of every frame besides

    def __post_init__(self) -> None:
        given = [self.videos, self.images, self.world]
        if sum(source is not None for source in given) != 1:
            raise UserError(
                f"got {3 - given.count(None)} of train_data (videos), image_data (pictures) and world (the built-in "
                "one), expected exactly one: say what to learn from"
            )
        if self.images and not self.single_frames:
            raise UserError("got image_data for a stage that learns motion, expected train_data or world")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels, where the config chooses them."""
        files = self.videos or self.images
        return files.size if files else None

    def series(self) -> Series:
        """The files as an endless series of clips."""
        if self.images:
            return Images(self.images, seed=self.seed)
        assert self.videos is not None
        videos = replace(self.videos, sample_n_frames=1) if self.single_frames else self.videos
        return Clips(videos, seed=self.seed)

    def check(self, log: Log) -> None:
        """Look at every file and log the report.

        Raises:
            UserError: none can be used, or there are no files.
        """
        if self.world:
            raise UserError("got --check-data for Shapes, the toy data set, which draws its own clips, expected files")
        report = self.series().scan(log=log)
        log(str(report))
        if not report.usable:
            raise UserError(
                f"got {report.total} {report.kind} of which none can be used, expected some: see the report"
            )

    def check_fit(self, vae: VAE) -> None:
        """Raises: UserError where the size is none that the VAE encodes."""
        if self.size and (side := next((s for s in self.size if s % vae.config.downsampling), None)):
            where = "train_data" if self.videos else "image_data"
            raise UserError(
                f"{where}: sample_size: got a side of {side} pixels, expected multiples of {vae.config.downsampling}"
            )

    def source(
        self, base: ImageModel, base_path: Path, folder: Path, *, cache: bool, num_workers: int, log: Log
    ) -> ClipSource:
        """Latents by the image model's VAE; those that are kept are in `folder`/clips.pt."""
        assert base.vae is not None
        if self.world:
            return self._of_world(self.world, base.vae, base_path, folder, log)
        series, tokenizer = self.series(), load_tokenizer(base_path)
        reader = ClipReader(series, num_workers=num_workers, log=log)
        if not cache:
            return StreamedClips(reader, base.vae, tokenizer, condition=self.condition)
        files = [(file, _version(file.path)) for file in series.files]
        made = repr((self.videos or self.images, self.single_frames, self.seed, base.report.sha256, files))
        key, count = {"made_from": hashlib.sha256(made.encode()).hexdigest()}, len(series.files)
        with first_process_first():
            return LatentClips.build(
                folder / "clips.pt",
                key,
                reader.batches(in_chunks(count)),
                base.vae,
                tokenizer,
                count=count,
                condition=self.condition,
                log=log,
            )

    def _of_world(self, world: World, vae: VAE, base_path: Path, folder: Path, log: Log) -> LatentClips:
        beside = base_path.parent / "clips.pt"  # the image stage may have encoded the same clips
        key = world_key(world, vae) | dict(self.condition.key if self.condition else {})
        path = beside if made_from(beside, key) else folder / "clips.pt"
        with first_process_first():
            clips = LatentClips.of_world(path, vae, world, condition=self.condition, log=log)
        clips.single_frames = self.single_frames
        return clips


def _version(path: Path) -> tuple[int, int] | None:
    """Changes when a file is replaced: its size and time of writing."""
    if not path.exists():
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer in a model folder, or CLIP's."""
    folder = model / "tokenizer"
    return Tokenizer.from_folder(folder) if folder.is_dir() else Tokenizer()


def resolve_path(path: str) -> Path:
    """A file or folder, from the current folder or the repository's root.

    Raises: UserError where there is none.
    """
    if (found := find_file(path)) is None:
        config = Path("configs/train") / f"{Path(path).parent.name}.yaml"  # an output folder is named after its config
        if Path(path).parts[:1] == ("outputs",) and find_file(str(config)):
            raise UserError(f"got {path}, which is not there: train it first: scripts/train.py --config {config}")
        raise UserError(f"got {path}, which is not there: check the path; nothing is downloaded for you")
    return found


def load_image_model(path: str | Path) -> ImageModel:
    """An image model with a VAE.

    Raises: UserError where the file has none.
    """
    model = load_base(resolve_path(str(path)))
    if model.text_encoder_2 is not None:
        raise UserError(f"got {path}, an SDXL model, expected one of SD 1.x: training knows no other")
    if model.vae is None:
        raise UserError(f"got {path} without a VAE, expected a complete image model: take a file that has one")
    return model
