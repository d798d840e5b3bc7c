"""Stage `shapes_encoder`: text and image encoder of Shapes, the toy data set, on frames and their captions."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from animatediff.checkpoints.small_clip_files import save_small_clip
from animatediff.config.networks import SmallCLIPConfig
from animatediff.config.settings import opt, options
from animatediff.models.small_clip import SmallCLIP
from animatediff.models.tokenizer import Tokenizer
from animatediff.training.distributed import rank_and_world_size
from animatediff.training.loop import LoopConfig, Stage, train
from animatediff.training.stage_config import Log, StageConfig
from animatediff.world.encoder import (
    WorldEncoder,
    draw_frames,
    matches,
    new_small_clip,
    retrieval,
    tokenize,
)
from animatediff.world.shapes import make_scene

FILE = "encoder.safetensors"


class ContrastiveStage(Stage):
    """CLIP's loss (Radford et al. 2021): a frame finds its caption in the batch, and a caption its frame.

    Scenes repeat within a batch, so every caption that is true of a frame counts as right.
    """

    name = "encoder"

    def __init__(self, model: SmallCLIP, *, data_seed: int = 0):
        self.model, self.data_seed = model, data_seed
        self._tokenizer = Tokenizer()

    def modules(self) -> nn.Module:
        return self.model

    def loss(self, index: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = [make_scene(index * batch_size + i, seed=self.data_seed) for i in range(batch_size)]
        tokens = tokenize(self._tokenizer, [s.caption for s in scenes], self.model.config.max_length)
        device = self.model.tokens.device
        texts = self.model.encode_tokens(tokens.to(device))
        images = self.model.encode_images(draw_frames(scenes, generator).to(device))
        logits = self.model.scale * texts @ images.T
        true = matches(scenes).to(logits)
        found = [(true * logits.log_softmax(dim)).sum(dim) / true.sum(dim) for dim in (0, 1)]
        right = true.gather(0, logits.argmax(dim=0, keepdim=True)).mean()
        return -(found[0].mean() + found[1].mean()) / 2, {"caption": 100 * float(right)}

    def export(self, folder: Path, metadata: dict[str, str]) -> None:
        save_small_clip(self.model, folder / FILE, metadata)


@options
class ShapesEncoder(StageConfig):
    """A small CLIP of Shapes; writes encoder.safetensors and logs how well it does on held-out scenes."""

    name: ClassVar[str] = "shapes_encoder"

    loop: LoopConfig = opt(..., "steps, batches and rates")
    encoder: SmallCLIPConfig = opt(SmallCLIPConfig(), "its sizes")

    def train(self, folder: Path, log: Log, device: torch.device) -> None:
        """As `StageConfig.run`."""
        torch.manual_seed(self.seed)
        stage = ContrastiveStage(new_small_clip(self.encoder).to(device), data_seed=self.seed)
        train(stage, self.loop, folder, log=log, stage_config=self)
        if rank_and_world_size()[0] == 0:
            found = retrieval(WorldEncoder.from_file(folder / FILE))
            log("held-out scenes, percent right: " + ", ".join(f"{name} {value}" for name, value in found.items()))
