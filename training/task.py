"""The one contract of the training loop: what it needs to know of a system that is trained."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batch(Protocol):
    """Anything with a number of examples that can move to a device: a tensor, or a dataclass such as a SeqBatch.

    To be recorded in a CUDA graph, a dataclass holds tensors and plain values only.
    """

    def __len__(self) -> int: ...

    def to(self, device: torch.device, /) -> Any:
        """The same batch on a device."""
        ...


class Task(Protocol):
    """What the loop needs to know of a system.

    Attributes:
        model: trained in place; after training it holds the best weights.
        selection_metric: key of `evaluate`'s result that chooses the best weights.
        higher_is_better: whether more of it is better.
    """

    model: nn.Module
    selection_metric: str
    higher_is_better: bool

    def batch(self, step: int) -> Batch:
        """Batch number `step` of this process, a pure function of (seed, step, process).

        Batches are counted over the whole training: with accumulation over A batches, optimizer step s takes the
        batches A * s to A * s + A - 1.
        """
        ...

    def item_keys(self, step: int) -> list[str]:
        """The items that batch number `step` of this process holds, for people who ask what was wrong with it."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Scalars by name; "loss" is optimised, the rest is logged.

        A function of the batch and of the model's weights alone: on CUDA devices it may be recorded and replayed
        (see `ops/graphs.py`), so whatever else changes from step to step is a tensor of the batch. `model` may be
        wrapped for several processes: call it, and read attributes from the task's own. What it writes in place into
        the model's parameters, it writes from the first step on, so that a step that is skipped can put it back;
        buffers that checkpoints leave out are constants.
        """
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation metrics, never test. The model is unwrapped and in eval mode, gradients are off."""
        ...
