"""One optimizer step: losses, backward, clipping, update. On a CUDA device all of it can be one graph."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ops.graphs import GraphedCall
from training.loop_config import LoopConfig
from training.task import Batch, Task


class StepSums(NamedTuple):
    """What is logged of one step, on the device.

    Attributes:
        names: "loss/..." summed over the step's batches, "overflow", "norm".
        values: [N] fp32 in the order of the names; valid until the next step.
        num_batches, num_examples: of the step.
    """

    names: tuple[str, ...]
    values: Tensor
    num_batches: int
    num_examples: int


class OptimizerStep:
    """Trains a model on the batches of one step.

    Args:
        task: has the loss.
        model: the task's, prepared for the processes of the run.
        optimizer: of its parameters.
        accelerator: has precision, loss scaling and device.
        config: accumulation and clipping.
        recorded: replay the step as a CUDA graph; asks for one batch per step, one process and
            `build_optimizer(recorded=True)`.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        accelerator: Accelerator,
        config: LoopConfig,
        recorded: bool,
    ) -> None:
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._num_batches = config.gradient_accumulation_steps
        self._max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self._parameters = list(model.parameters())
        self._names: tuple[str, ...] = ()
        self._graphed = GraphedCall(
            lambda batch: self._train([batch]),
            device=accelerator.device,
            name="training step",
            enabled=recorded,
            memory=[*self._parameters, *model.buffers()],
        )

    def __call__(self, batches: Iterable[Batch]) -> StepSums:
        """Train on the batches; `batches` is read as it is needed."""
        num_examples = 0

        def counted() -> Iterable[Batch]:
            nonlocal num_examples
            for batch in batches:
                num_examples += len(batch)
                yield batch

        if self._graphed.records:
            (batch,) = counted()
            values = self._graphed(batch)
        else:
            values = self._train(batch.to(self._accelerator.device) for batch in counted())
        return StepSums(self._names, values, self._num_batches, num_examples)

    def _train(self, batches: Iterable[Batch]) -> Tensor:
        totals: dict[str, Tensor] = {}
        try:
            for index, batch in enumerate(batches):
                is_last = index == self._num_batches - 1
                with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                    for name, loss in self._backward(batch).items():
                        totals[name] = totals[name] + loss if name in totals else loss
            norm = self._update()
        finally:
            self._forget()
        overflow = ~torch.isfinite(norm)
        # With loss scaling the step of an overflow is skipped and counted; without, its norm must show as not finite.
        norm = norm if self._accelerator.scaler is None else norm.masked_fill(overflow, 0.0)
        self._names = (*(f"loss/{name}" for name in totals), "overflow", "norm")
        return torch.stack([*totals.values(), overflow.float(), norm.float()])

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        # The cache of autocast is cleared where it ends, so a recording never takes weights that were cast before it.
        with self._accelerator.autocast():
            losses = self._task.loss(self._model, batch)
        loss = losses["loss"] if self._num_batches == 1 else losses["loss"] / self._num_batches
        scaler = self._accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return {name: value.detach().float() for name, value in losses.items()}

    def _update(self) -> Tensor:
        """Clip and step; the norm of the gradients before clipping.

        Accelerate's wrappers search the installed packages at each step, and wait to learn whether it was skipped.
        """
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()
        return norm

    def _forget(self) -> None:
        """Let go of the gradients, and of what a failed recording has left in the scaler."""
        self._optimizer.zero_grad()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler._per_optimizer_states.clear()
