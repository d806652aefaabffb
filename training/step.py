"""One optimizer step: losses, backward, clipping, update. On a CUDA device all of it can be one graph."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from ops.graphs import GraphedCall
from training.averages import AveragedWeights
from training.in_place import InPlaceChanges
from training.loop_config import LoopConfig
from training.optimizers import step_unless_
from training.task import Batch, Task


class StepSums(NamedTuple):
    """What is logged of one step, on the device.

    Attributes:
        names: "loss/..." summed over the step's batches, "norm", "skipped", and with loss scaling "overflow".
        values: [N] fp32 in the order of the names, all finite; valid until the next step. A step that did not count
            has 1 under "skipped" or "overflow", and 0 elsewhere.
        num_batches, num_examples: of the step.
    """

    names: tuple[str, ...]
    values: Tensor
    num_batches: int
    num_examples: int


class OptimizerStep:
    """Trains a model on the batches of one step.

    A step counts if all its losses and the norm of its gradients are finite, on every process. One that does not count
    changes no weight, moment, average or buffer, and is logged as one of two kinds: "overflow", where loss scaling
    was too high and has been lowered, which is its way of working; or "skipped". All of this is decided on the device.

    Args:
        task: has the loss.
        model: the task's, prepared for the processes of the run.
        optimizer: of its parameters, by `build_optimizer`.
        accelerator: has precision, loss scaling and device.
        config: accumulation and clipping.
        recorded: replay the step as a CUDA graph; asks for one batch per step, one process and
            `build_optimizer(recorded=True)`.
        averages: of the model's weights, updated by every step that counts.
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
        averages: AveragedWeights | None = None,
    ) -> None:
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._averages = averages
        self._num_batches = config.gradient_accumulation_steps
        self._max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self._parameters = list(model.parameters())
        self._changes = InPlaceChanges(model)
        self._skipped_in_a_row = torch.zeros((), device=accelerator.device)
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

        def counted() -> Iterator[Batch]:
            nonlocal num_examples
            for batch in self._drawn(batches):
                num_examples += len(batch)
                yield batch

        if self._graphed.records:
            (batch,) = counted()
            values = self._graphed(batch)
        else:
            values = self._train(counted())
        return StepSums(self._names, values, self._num_batches, num_examples)

    def skipped_in_a_row(self) -> int:
        """Steps that were skipped since the last one that was not. Waits for the device."""
        return int(self._skipped_in_a_row)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs besides model, optimizer, scaler and averages."""
        return {"skipped_in_a_row": self.skipped_in_a_row()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._skipped_in_a_row.fill_(state["skipped_in_a_row"])

    def _drawn(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on their device; a recorded step moves them itself."""
        iterator = iter(batches)
        while True:
            with _phase("data"):
                batch = next(iterator, None)
                if batch is not None and not self._graphed.records:
                    batch = batch.to(self._accelerator.device)
            if batch is None:
                return
            yield batch

    def _train(self, batches: Iterable[Batch]) -> Tensor:
        totals: dict[str, Tensor] = {}
        self._changes.begin()
        try:
            for index, batch in enumerate(batches):
                is_last = index == self._num_batches - 1
                with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                    for name, loss in self._backward(batch).items():
                        totals[name] = totals[name] + loss if name in totals else loss
            with _phase("optimizer"):
                values = self._update(list(totals.values()))
        finally:
            self._forget()
        kinds = ("skipped",) if self._accelerator.scaler is None else ("skipped", "overflow")
        self._names = (*(f"loss/{name}" for name in totals), "norm", *kinds)
        return values

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        # The cache of autocast is cleared where it ends, so a recording never takes weights that were cast before it.
        with _phase("forward"), self._accelerator.autocast():
            losses = self._task.loss(self._model, batch)
        with _phase("backward"):
            loss = losses["loss"] if self._num_batches == 1 else losses["loss"] / self._num_batches
            scaler = self._accelerator.scaler
            (loss if scaler is None else scaler.scale(loss)).backward()
        return {name: value.detach().float() for name, value in losses.items()}

    def _update(self, losses: list[Tensor]) -> Tensor:
        """Clip, and step if the step counts; what is logged of it.

        Accelerate's wrappers search the installed packages at each step, and wait to learn whether it was skipped.
        """
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        values = torch.stack([*losses, norm.float()])
        failed = self._on_any_process(~torch.isfinite(values).all())
        kinds = self._kinds(failed, values[:-1])
        self._changes.end(undo=failed)
        step_unless_(self._optimizer, failed.float())
        if scaler is not None:
            scaler.update()
        if self._averages is not None:
            self._averages.update_((~failed).float())
        self._skipped_in_a_row.add_(1).mul_(kinds[0])
        return torch.cat([values.masked_fill(failed, 0.0), kinds])

    def _kinds(self, failed: Tensor, losses: Tensor) -> Tensor:
        """[1] or, with loss scaling, [2] fp32, 0 or 1: was the step skipped, was it an overflow.

        An overflow is what a lower scale mends, and the scaler lowers it. It mends neither a loss that is not finite
        nor gradients that overflow without a scale: then the scale stays.
        """
        scaler = self._accelerator.scaler
        if scaler is None:
            return failed.float()[None]
        scale, growth = scaler._check_scale_growth_tracker("step")
        bad_loss = self._on_any_process(~torch.isfinite(losses).all())
        (found,) = scaler._found_inf_per_device(self._optimizer).values()
        overflow = found.mul_((~bad_loss & (scale > 1)).float())
        skipped = failed.float() - overflow
        growth.sub_(skipped.int())  # `update` counts a step without overflow as a success
        return torch.stack([skipped, overflow])

    def _on_any_process(self, flag: Tensor) -> Tensor:
        """[] bool, without waiting; nothing to do for a single process."""
        if self._accelerator.num_processes == 1:
            return flag
        return self._accelerator.reduce(flag.float(), reduction="sum") > 0

    def _forget(self) -> None:
        """Let go of the gradients, and of what a failed recording has left in the scaler."""
        self._optimizer.zero_grad()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler._per_optimizer_states.clear()


def _phase(name: str) -> AbstractContextManager[object]:
    """Names a part of the step for a profiler that watches; unwatched, the spans would cost a small step 2%."""
    return record_function(name) if torch.autograd.profiler._is_profiler_enabled else nullcontext()
