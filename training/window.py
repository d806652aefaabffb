"""What is logged of the steps since the last log, summed on the device so that no step waits for it."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from training.step import StepSums


class Window:
    """Sums of losses, gradient norms and examples since the last log: one vector, one addition per step.

    Args:
        accelerator: averages over processes when the sums are read; has the loss scaling.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Start a new window now."""
        self._names: tuple[str, ...] = ()
        self._sums = torch.zeros(0)
        self._batches = 0
        self._steps = 0
        self._examples = 0
        self._started = time.perf_counter()

    def add(self, step: StepSums) -> None:
        """One optimizer step."""
        if self._names == step.names:
            self._sums += step.values
        else:
            self._sums = self._ordered(step.names, step.values) + step.values
            self._names = step.names
        self._batches += step.num_batches
        self._examples += step.num_examples
        self._steps += 1

    def restart_clock(self) -> None:
        """Time counts from now."""
        self._started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Time that did not go into steps."""
        self._started += seconds

    @property
    def num_steps(self) -> int:
        """Steps since the last log."""
        return self._steps

    def read(self) -> dict[str, float]:
        """What is logged. Waits for the device.

        Returns:
            Means of train/loss, its parts and the gradient's norm over the steps that counted, NaN where none did;
            train/skipped_steps, with loss scaling train/overflow_steps; examples per second over all processes.
        """
        means = self._accelerator.reduce(self._sums, reduction="mean")
        sums = dict(zip(self._names, means.tolist(), strict=True))
        seconds = time.perf_counter() - self._started
        skipped, overflow = sums.pop("skipped"), sums.pop("overflow", 0.0)
        counted = self._steps - skipped - overflow
        per_step = self._batches / self._steps
        values = {
            f"train/{name.removeprefix('loss/')}": _mean(total, counted * per_step)
            for name, total in sums.items()
            if name != "norm"
        }
        values["train/gradient_norm"] = _mean(sums["norm"], counted)
        values["train/skipped_steps"] = skipped
        if self._accelerator.scaler is not None:
            values["train/overflow_steps"] = overflow
        values["train/examples_per_second"] = self._examples * self._accelerator.num_processes / max(seconds, 1e-9)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything but the clock; all processes take part, and each goes on with the means of their sums."""
        means = self._accelerator.reduce(self._sums, reduction="mean") if self._steps else self._sums
        sums = dict(zip(self._names, means.cpu(), strict=True))
        return {"sums": sums, "batches": self._batches, "steps": self._steps, "examples": self._examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved window; its speed counts from now."""
        self.reset()
        if state["sums"]:
            self._names = tuple(state["sums"])
            self._sums = torch.stack(list(state["sums"].values())).to(self._accelerator.device)
        self._batches, self._steps = state["batches"], state["steps"]

    def _ordered(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """The sums in the order of these names, zero for a new one."""
        sums = dict(zip(self._names, self._sums, strict=True))
        return torch.stack([sums[name] if name in sums else torch.zeros_like(like[0]) for name in names])


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
