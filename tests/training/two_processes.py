"""Started by torchrun in test_stages.py, `FOLDER CONFIG`: the script's training, after gradients and a broken batch of
rows were looked at in each process; and then a mistake.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from animatediff.training.distributed import rank_and_world_size, shared_loss
from animatediff.training.loop import step_gradients
from animatediff.training.loop import train as run_loop
from animatediff.training.stages import MotionModule
from animatediff.utils import UserError, run_main
from scripts import train
from tests.training.line import CONFIG, Rows, quiet

HALVES = replace(CONFIG, batch_size=4, micro_batches=2)


def look(folder: Path) -> None:
    stage, rank = Rows(), rank_and_world_size()[0]
    step_gradients(shared_loss(stage, torch.nn.ParameterList(stage.net.parameters())), HALVES, step=0)
    torch.save([p.grad for p in stage.net.parameters()], folder / f"gradients{rank}.pt")
    with pytest.raises(UserError) as caught:
        run_loop(Rows(broken=5), HALVES, folder / "broken", log=quiet)
    (folder / f"message{rank}.txt").write_text(str(caught.value))


def main(folder: Path, config: str) -> None:
    run = MotionModule.run

    def look_and_run(self, log, device):
        log("both say so")
        look(folder)
        run(self, log, device)

    MotionModule.run = look_and_run
    train.main(["--config", config])
    run_main(lambda: train.main(["--config", config, "seed=one"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
