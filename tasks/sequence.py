"""Training models of item histories."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from data.batching import Examples, ExampleStrategy, TrainingBatches
from data.schemas import SeqBatch
from tasks.protocol import EvaluationProtocol
from training.loop_config import LoopConfig
from training.processes import process_state


class SequenceTask:
    """What the training loop needs to know of a model that is trained on batches of item ids.

    Args:
        model: its `forward` returns the losses of a batch.
        batches: training batches of item ids.
        item_keys: of the catalogue.
        validate: metrics of the model as it is, on validation targets.
        selection_metric: key of a metric of `validate` that chooses the best weights.
    """

    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        batches: TrainingBatches,
        *,
        item_keys: Sequence[str],
        validate: Callable[[], dict[str, float]],
        selection_metric: str,
    ) -> None:
        self.model = model
        self.selection_metric = selection_metric
        self._batches = batches
        self._item_keys = item_keys
        self._validate = validate

    def batch(self, step: int) -> Examples | SeqBatch:
        """Where the histories and targets of a step lie."""
        return self._batches.draw(step)

    def item_keys(self, step: int) -> list[str]:
        """Every item of the histories and targets of a step once."""
        batch = self._batches.batch(step)
        assert batch.targets is not None
        ids = torch.cat([batch.item_ids[: int(batch.offsets[-1])], batch.targets]).unique()
        return [self._item_keys[item_id] for item_id in ids.tolist()]

    def loss(self, model: nn.Module, batch: Examples | SeqBatch) -> dict[str, Tensor]:
        """What the model's `forward` returns for the batch."""
        return model(self._batches.pack(batch))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Item-level metrics on validation targets."""
        return self._validate()


def training_batches(
    protocol: EvaluationProtocol, loop: LoopConfig, *, strategy: ExampleStrategy, batch_size: int, seed: int
) -> TrainingBatches:
    """Batches of this process over the training ranges of a protocol's split, as the loop wants them.

    Args:
        protocol: the histories, and how many of their last items are read.
        loop: whether steps are recorded, which wants batches of few shapes.
        strategy: how training ranges become examples.
        batch_size: examples per process and step.
        seed: of their order.
    """
    process = process_state()
    return TrainingBatches(
        protocol.dataset.histories,
        protocol.split.train,
        strategy=strategy,
        max_history=protocol.max_history,
        batch_size=batch_size,
        seed=seed,
        device=process.device,
        fixed_capacity=loop.uses_cuda_graphs(process.num_processes),
        process_index=process.process_index,
        num_processes=process.num_processes,
    )
