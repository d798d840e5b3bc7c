"""A stage of one weight matrix: fit y = 2 x.  `python -m tests.training.line FOLDER step|save` trains it and kills
itself, in a step or while a checkpoint is being written.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from animatediff.training.loop import LoopConfig, Stage, train

CONFIG = LoopConfig(steps=40, batch_size=8, learning_rate=0.05, warmup_steps=4, checkpoint_every=10, ema_decay=0.9)


class Line(Stage):
    name = "line"

    def __init__(self, autocast=None):
        torch.manual_seed(0)
        self.net, self.calls = torch.nn.Linear(3, 3), 0
        self.autocast, self.scale_loss = autocast, autocast == torch.float16

    def modules(self):
        return self.net

    def loss(self, step, batch_size, generator):
        self.calls += 1
        x = torch.randn(batch_size, 3, generator=generator)
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            y = self.net(x)
        return (y.float() - 2 * x).square().mean(), {}

    def export(self, folder, metadata):
        self.exported = {k: v.clone() for k, v in self.net.state_dict().items()}
        torch.save(self.exported, folder / "line.pt")


class Rows(Line):
    """Learns from given rows in their order, so that batches of any size come to the same. Row `broken` is infinite."""

    def __init__(self, broken=None):
        super().__init__()
        self.rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
        if broken is not None:
            self.rows[broken] = torch.inf

    def loss(self, index, batch_size, generator):
        self.last = range(index * batch_size, (index + 1) * batch_size)
        x = self.rows[self.last.start : self.last.stop]
        return (self.net(x) - 2 * x).square().mean(), {}

    def names(self):
        return [f"row{i}" for i in self.last]


def quiet(line: str) -> None:
    pass


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder: Path, where: str) -> None:
    stage, loss, save = Line(), Line.loss, torch.save

    def half(state, file):
        if state["step"] < 30:
            return save(state, file)
        file.write(b"half of a checkpoint")
        file.flush()
        die()

    if where == "step":
        stage.loss = lambda step, *rest: die() if step == 17 else loss(stage, step, *rest)
    else:
        torch.save = half
    train(stage, CONFIG, folder, log=quiet)


if __name__ == "__main__":
    train_and_die(Path(sys.argv[1]), sys.argv[2])
