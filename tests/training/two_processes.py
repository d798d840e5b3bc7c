"""Two processes of a training without torchrun, whose own tests are slow ones: what it tells them, and nothing else."""

import multiprocessing
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from animatediff.training.distributed import rank_and_world_size, shared_loss
from animatediff.training.loop import step_gradients
from animatediff.training.loop import train as run_loop
from animatediff.training.stages import MotionModule
from animatediff.utils import UserError, run_main
from scripts import train
from tests.training.line import CONFIG, Rows, quiet

HALVES = replace(CONFIG, batch_size=4, micro_batches=2)


def two_processes(work: Callable[[], None], folder: Path) -> None:
    """`work` in forks of this process as torchrun starts two; they write output0.txt, output1.txt and errors."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def process(rank: int) -> None:
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in env.items()})
        with (folder / f"output{rank}.txt").open("w") as out, (folder / f"errors{rank}.txt").open("w") as err:
            with redirect_stdout(out), redirect_stderr(err):
                work()

    both = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in (0, 1)]
    for child in both:
        child.start()
    for child in both:
        child.join(300)
        child.kill()  # where it hangs


def look(folder: Path) -> None:
    stage, rank = Rows(), rank_and_world_size()[0]
    step_gradients(shared_loss(stage, torch.nn.ParameterList(stage.net.parameters())), HALVES, step=0)
    torch.save([p.grad for p in stage.net.parameters()], folder / f"gradients{rank}.pt")
    with pytest.raises(UserError) as caught:
        run_loop(Rows(broken=5), HALVES, folder / "broken", log=quiet)
    (folder / f"message{rank}.txt").write_text(str(caught.value))


def train_looked_at(folder: Path, config: Path) -> None:
    """The script's training, after gradients and a broken batch of rows were looked at; and then a mistake."""
    run = MotionModule.run

    def look_and_run(self, log, device):
        log("both say so")
        look(folder)
        run(self, log, device)

    MotionModule.run = look_and_run
    train.main(["--config", str(config)])
    run_main(lambda: train.main(["--config", str(config), "seed=one"]))
