"""Everything of a running training that a checkpoint has to bring back, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from data.schemas import InputError
from training.averages import AveragedWeights
from training.optimizers import load_optimizer_state_, optimizer_state
from training.random_state import random_state, restore_random_state
from training.step import OptimizerStep
from training.window import Window


@dataclass(frozen=True)
class TrainingParts:
    """What changes while training goes on, besides the numbers of `progress.json`.

    Attributes:
        averages: None where the weights themselves are evaluated.
    """

    model: nn.Module
    optimizer: Optimizer
    step: OptimizerStep
    averages: AveragedWeights | None
    window: Window
    accelerator: Accelerator

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; all processes take part, since each has random states of its own."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "averages": None if self.averages is None else self.averages.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": self.step.state_dict(),
            "window": self.window.state_dict(),
            "random": gather_object([random_state(self.accelerator.device)]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: if it is that of another model, optimizer or number of processes; nothing starts then.
        """
        self._check_processes(len(state["random"]))
        try:
            self.model.load_state_dict(state["model"])
            load_optimizer_state_(self.optimizer, state["optimizer"])
            self._load_averages(state.get("averages"))
        except (RuntimeError, ValueError, KeyError) as error:
            summary = " ".join(str(error).split())[:300]
            raise InputError(
                f"does not fit this model or optimizer: {summary} Resume with the config of that run, or start again "
                "with --overwrite."
            ) from error
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if "step" in state:
            self.step.load_state_dict(state["step"])
        self.window.load_state_dict(state["window"])
        restore_random_state(state["random"][self.accelerator.process_index], self.accelerator.device)

    def _check_processes(self, before: int) -> None:
        now = self.accelerator.num_processes
        if before != now:
            raise InputError(f"was saved by {before} processes, this run has {now}. Start as many.")

    def _load_averages(self, averages: Mapping[str, Any] | None) -> None:
        """Averages that begin now begin as the weights; the constructor has copied others."""
        if self.averages is None:
            return
        if averages is None:
            self.averages.restart_()
        else:
            self.averages.load_state_dict(averages)
