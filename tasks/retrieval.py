"""Training the retrieval model: histories as tokens, and the losses of the next item."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from data.batching import Examples, TrainingBatches
from data.schemas import SeqBatch
from modules.item_table import ItemTable
from modules.model import EncoderDecoderRetrievalModel
from modules.tokenizer.sequence import SequenceTokenizer


class RetrievalTask:
    """What the training loop needs to know of the retrieval model.

    Args:
        model: the encoder-decoder.
        batches: training batches of item ids.
        tokenize: item ids to the model's tokens.
        item_keys: of the catalogue.
        validate: metrics of the model as it is, on validation targets.
        items: features of the catalogue, for a model that reads them.
        selection_metric: key of a metric of `validate` that chooses the best weights.
    """

    selection_metric = "generative/valid/all/ndcg@10"
    higher_is_better = True

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        batches: TrainingBatches,
        *,
        tokenize: SequenceTokenizer,
        item_keys: Sequence[str],
        validate: Callable[[], dict[str, float]],
        items: ItemTable | None = None,
        selection_metric: str = selection_metric,
    ) -> None:
        self.model: nn.Module = model
        self._batches = batches
        self._tokenize = tokenize
        self._item_keys = item_keys
        self._validate = validate
        self._items = items
        self.selection_metric = selection_metric

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
        histories = self._batches.pack(batch)
        device = histories.item_ids.device
        tokens = self._tokenize.to(device)(histories)
        if self._items is None:
            return model(tokens)
        self._items = self._items.to(device)  # moves once; recorded steps read it where it then lies
        return model(tokens, self._items)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Item-level metrics on validation targets."""
        return self._validate()
