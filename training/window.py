"""What is logged of the steps since the last log, summed on the device so that no step waits for it."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Window:
    """Sums of losses, gradient norms and examples since the last log.

    Args:
        accelerator: averages over processes when the sums are read.
        overflow_allowed: gradients may overflow now and then (fp16 loss scaling skips such steps); they are counted
            and left out of the mean norm.
    """

    def __init__(self, accelerator: Accelerator, *, overflow_allowed: bool) -> None:
        self._accelerator = accelerator
        self._overflow_allowed = overflow_allowed
        self.reset()

    def reset(self) -> None:
        """Start a new window now."""
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._steps = 0
        self._examples = 0
        self._started = time.perf_counter()

    def add_batch(self, losses: dict[str, Tensor], num_examples: int) -> None:
        """Losses of one batch."""
        for name, value in losses.items():
            self._add(f"loss/{name}", value.detach())
        self._batches += 1
        self._examples += num_examples

    def add_step(self, gradient_norm: Tensor) -> None:
        """Gradient norm of one optimizer step."""
        overflow = ~torch.isfinite(gradient_norm)
        self._add("overflow", overflow)
        norm = torch.where(overflow, 0.0, gradient_norm) if self._overflow_allowed else gradient_norm
        self._add("norm", norm)
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

    def is_finite(self) -> bool:
        """Whether every loss, and every gradient unless overflow is allowed, was finite. Waits for the device."""
        sums = [value for name, value in self._sums.items() if name != "overflow"]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())

    def read(self) -> dict[str, float]:
        """Means since the last log: train/loss and its parts, gradient norm, examples per second over all processes."""
        names = list(self._sums)
        means = self._accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="mean")
        sums = dict(zip(names, means.tolist(), strict=True))
        seconds = time.perf_counter() - self._started
        overflow = sums.pop("overflow")
        values = {
            f"train/{name.removeprefix('loss/')}": total / self._batches
            for name, total in sums.items()
            if name != "norm"
        }
        values["train/gradient_norm"] = sums["norm"] / max(self._steps - overflow, 1.0)
        if self._overflow_allowed:
            values["train/overflow_steps"] = overflow
        values["train/examples_per_second"] = self._examples * self._accelerator.num_processes / max(seconds, 1e-9)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything but the clock."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        return {"sums": sums, "batches": self._batches, "steps": self._steps, "examples": self._examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a saved window; its speed counts from now."""
        self.reset()
        self._sums = {name: value.to(self._accelerator.device) for name, value in state["sums"].items()}
        self._batches, self._steps = state["batches"], state["steps"]

    def _add(self, name: str, value: Tensor) -> None:
        value = value.float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
