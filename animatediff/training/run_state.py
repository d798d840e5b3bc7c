"""state.pt: all that a run needs to go on. It appears whole or not at all, and the one before it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animatediff.checkpoints.pickles import DAMAGE
from animatediff.training.output_folder import damaged, read_tensors, write_tensors
from animatediff.utils import UserError

if TYPE_CHECKING:
    from animatediff.training.loop import Trainer

# What may differ when a run goes on: of the loop,
MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "tensorboard", "learning_rate")
# and of the stage, where loops are compared by themselves.
NOT_OF_THE_RUN = (
    "loop", "autoencoder", "image", "output_dir", "samples", "cache", "num_workers", "gradient_checkpointing"
)  # fmt: skip
REQUIRED = ("steps", "batch_size", "learning_rate")  # of a loop


class RunState:
    """What is kept of a run.

    Args:
        folder: where state.pt is, and state.previous.pt, the one before it.
        stage: the config of the stage, where it has one.
        trainer: of the run.
    """

    def __init__(self, folder: Path, stage: Any, trainer: Trainer):
        self.path, self.previous = folder / "state.pt", folder / "state.previous.pt"
        self.trainer, self.loop, self.stage = trainer, trainer.config, flat(stage) if stage else {}

    def save(self, step: int) -> None:
        """Write what `resume` reads, after `step` steps."""
        names = [name for name, _ in self.trainer.named]
        state = {
            "config": asdict(self.loop),
            "stage": self.stage,
            "step": step,
            "model": {name: p.detach() for name, p in self.trainer.named},
            "ema": {name: p.detach() for name, p in zip(names, self.trainer.averages, strict=True)},
            "optimizer": self.trainer.optimizer.state_dict(),
            "scaler": self.trainer.scaler.state_dict(),
        }
        write_tensors(self.path, state, previous=self.previous)

    def resume(self, log: Callable[[str], None] = print) -> int:
        """Put everything back as it was; returns the number of steps done.

        Raises:
            UserError: a file that cannot be read, a run of another configuration, or of networks of other sizes.
        """
        path = next((p for p in (self.path, self.previous) if p.exists()), None)
        if path is None:
            return 0
        others = self.previous.name if path == self.path and self.previous.exists() else "step 0"
        remedy = f"which goes on from {others}"
        state = read_tensors(path, keys={"config", "step", "model", "ema", "optimizer"}, remedy=remedy)
        try:
            if type(state["step"]) is not int:
                raise ValueError("its step is no number")
            self._check(state)
            self._say_changes(state, log)
            for (name, parameter), average in zip(self.trainer.named, self.trainer.averages, strict=True):
                parameter.data.copy_(state["model"][name])
                average.data.copy_(state["ema"][name])
            self.trainer.optimizer.load_state_dict(state["optimizer"])
            if state.get("scaler"):
                self.trainer.scaler.load_state_dict(state["scaler"])
            return state["step"]
        except UserError:
            raise
        except DAMAGE as error:
            raise damaged(path, error, remedy) from None

    def _say_changes(self, state: dict[str, Any], log: Callable[[str], None]) -> None:
        """Raises: UserError where the run has more steps than it is to have."""
        loop, began, done = self.loop, state["config"], state["step"]
        if done > loop.steps:
            raise UserError(
                f"got steps={loop.steps} for the run in {self.path.parent}, expected at least the {done} that it has "
                "done: give more, or choose another output folder"
            )
        if (rate := began.get("learning_rate")) != loop.learning_rate:
            log(f"learning_rate {loop.learning_rate:g} from step {done} on, {rate:g} before")
        if (steps := began.get("steps")) != loop.steps and done < loop.steps:
            rate = f"{loop.schedule} learning rate"
            bend = "stays" if loop.schedule == "constant" else f"is from step {done} on that of a run of {loop.steps}"
            log(f"{loop.steps} steps in place of {steps}: the {rate} {bend}")

    def _check(self, state: dict[str, Any]) -> None:
        defaults = type(self.loop)(**{key: getattr(self.loop, key) for key in REQUIRED})  # newer keys than the run
        began, now = asdict(defaults) | state["config"], asdict(self.loop)
        for key, value in now.items():
            if key not in MAY_CHANGE:
                self._same(key, began[key], value)
        for key, value in self.stage.items():
            self._same(key, state.get("stage", {}).get(key, value), value)
        model, average = ({n: tuple(t.shape) for n, t in state[part].items()} for part in ("model", "ema"))
        own = {n: tuple(t.shape) for n, t in self.trainer.named}
        for began in (model, average):
            for name in sorted(began.keys() | own.keys()):
                self._same(f"{name}.shape", began.get(name), own.get(name))

    def _same(self, key: str, began: object, now: object) -> None:
        if began != now:
            raise UserError(
                f"got {key}={now} for the run in {self.path.parent}, expected {began} as it began; "
                "keep the configuration or choose another output folder"
            )


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """The values of a config as texts, those of nested ones as `train_data.sample_size`."""
    texts = {}
    for field in fields(config):
        if (name := prefix + field.name) in NOT_OF_THE_RUN:
            continue
        value = getattr(config, field.name)
        texts[name] = type(value).__name__ if is_dataclass(value) else repr(value)
        if is_dataclass(value):
            texts |= flat(value, f"{name}.")
    return texts
