"""What the config of every stage of training has in common, and how it is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from animatediff.config.settings import Int, opt, options
from animatediff.training.output_folder import training_folder
from animatediff.utils import UserError, is_out_of_memory

Log = Callable[[str], None]
CPU = torch.device("cpu")


@options
class StageConfig(ABC):
    """A stage of training: its values are the keys of a YAML, `run` trains it."""

    name: ClassVar[str]  # `stage:` of the YAML

    output_dir: str = opt(..., "folder of everything that the training writes")
    seed: Int = opt(0, "of fresh weights and of the order of the clips", ge=0, le=2**64 - 1)

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise UserError("output_dir: got an empty text, expected a folder to write into")

    def run(self, log: Log, device: torch.device = CPU) -> None:
        """Train, or go on; writes the result into `output_dir`.

        Raises: UserError where a file is missing or is something else, values do not fit each other, another training
            is at work in the folder, or memory runs out.
        """
        with training_folder(self.output_dir) as folder:
            try:
                self.train(folder, log, device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"got a training that takes more memory than there is on {device}: lower batch_size (and raise "
                    "micro_batches), the size or number of frames or the rank, or take gradient_checkpointing: true"
                ) from None

    @abstractmethod
    def train(self, folder: Path, log: Log, device: torch.device) -> None:
        """As `run`, with the folder for this training alone."""
