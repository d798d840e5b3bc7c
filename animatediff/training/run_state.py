"""state.pt: all that a run needs to go on. It appears whole or not at all, and the one before it is kept."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from animatediff.utils import UserError

# What may differ when a run goes on: of the loop,
MAY_CHANGE = ("log_every", "checkpoint_every", "tensorboard", "learning_rate")
# and of the stage, where loops are compared by themselves.
NOT_OF_THE_RUN = ("loop", "autoencoder", "image", "output_dir", "samples", "cache", "threads", "gradient_checkpointing")


class RunState:
    """What is kept of a run.

    Args:
        folder: where state.pt is, and state.previous.pt, the one before it.
        loop: a LoopConfig.
        stage: the config of the stage, where it has one.
        named, ema: parameters that learn, and their averages.
        optimizer, scaler: theirs.
    """

    def __init__(
        self,
        folder: Path,
        loop: Any,
        stage: Any,
        named: Sequence[tuple[str, nn.Parameter]],
        ema: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ):
        self.path, self.previous = folder / "state.pt", folder / "state.previous.pt"
        self.loop, self.stage = loop, flat(stage) if stage else {}
        self.named, self.ema, self.optimizer, self.scaler = named, ema, optimizer, scaler

    def save(self, step: int) -> None:
        state = {
            "config": asdict(self.loop),
            "stage": self.stage,
            "step": step,
            "model": {n: p.detach() for n, p in self.named},
            "ema": {n: e for (n, _), e in zip(self.named, self.ema, strict=True)},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if self.path.exists():
            os.replace(self.path, self.previous)  # a run that is killed here goes on from it
        os.replace(temporary, self.path)

    def resume(self, log: Callable[[str], None] = print) -> int:
        """Put everything back as it was; returns the number of steps done.

        Raises:
            UserError: a file that cannot be read, a run of another configuration, or of networks of other sizes.
        """
        path = next((p for p in (self.path, self.previous) if p.exists()), None)
        if path is None:
            return 0
        state = self._read(path)
        self._check(state)
        began = state["config"].get("learning_rate")
        if began != self.loop.learning_rate:
            log(f"learning_rate {self.loop.learning_rate:g} from step {state['step']} on, {began:g} before")
        for (name, parameter), average in zip(self.named, self.ema, strict=True):
            parameter.data.copy_(state["model"][name])
            average.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            # Mapped, as every process of a machine reads it; on Windows that would keep it from being replaced.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            others = self.previous.name if path == self.path and self.previous.exists() else "step 0"
            raise UserError(
                f"got {path}, which cannot be read ({' '.join(str(error).split())[:100]}), expected the checkpoint of "
                f"a run: if it is damaged, delete it and run again, which goes on from {others}"
            ) from None

    def _check(self, state: dict[str, Any]) -> None:
        defaults = {f.name: f.default for f in fields(self.loop) if f.default is not MISSING}  # newer than the run
        began, now = defaults | state["config"], asdict(self.loop)
        for key, value in now.items():
            if key not in MAY_CHANGE:
                self._same(key, began[key], value)
        for key, value in self.stage.items():
            self._same(key, state.get("stage", {}).get(key, value), value)
        began, now = ({n: tuple(t.shape) for n, t in tensors} for tensors in (state["model"].items(), self.named))
        for name in sorted(began.keys() | now.keys()):
            self._same(f"{name}.shape", began.get(name), now.get(name))

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
