"""Training the retrieval model: histories as tokens, and the losses of the next item."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from data.batching import Examples, TrainingBatches
from data.schemas import SeqBatch
from modules.item_table import ItemTable
from modules.model import EncoderDecoderRetrievalModel
from modules.tokenizer.sequence import SequenceTokenizer
from tasks.sequence import SequenceTask


class RetrievalTask(SequenceTask):
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
        super().__init__(model, batches, item_keys=item_keys, validate=validate, selection_metric=selection_metric)
        self._tokenize = tokenize
        self._items = items

    def loss(self, model: nn.Module, batch: Examples | SeqBatch) -> dict[str, Tensor]:
        """What the model's `forward` returns for the batch."""
        histories = self._batches.pack(batch)
        device = histories.item_ids.device
        tokens = self._tokenize.to(device)(histories)
        if self._items is None:
            return model(tokens)
        self._items = self._items.to(device)  # moves once; recorded steps read it where it then lies
        return model(tokens, self._items)
