"""The dense ranker: cosines of the retrieval model's encoder state with the projections of all items."""

from torch import Tensor

from data.schemas import InputError, SeqBatch
from modules.dense.projected_items import ProjectedItems
from modules.dense.vector_ranker import VectorRanker
from modules.item_table import ItemTable
from modules.model import EncoderDecoderRetrievalModel
from modules.ranking import check_codes
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer


class DenseRanker(VectorRanker):
    """Ranks all items by the model's dense head, cold ones among them (Yang et al. 2024, "LIGER").

    Args:
        model: with a dense head, used in evaluation mode on whatever device it lies at the time of a call.
        tokenizer: the one that the model was trained with, or one that has grown from it.
        items: of the tokenizer's catalogue; or their projections, which other rankers may share.
        name: of the ranker.
        max_history: only a row's last items up to this number are read, as in training.
        batch_size: histories that the model reads at once.

    Raises:
        InputError: if a number is below 1, the model has no dense head, or tokenizer and items do not fit the model or
            each other.
    """

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        tokenizer: SemanticIdTokenizer,
        items: ItemTable | ProjectedItems | None,
        *,
        name: str = "dense",
        max_history: int = 20,
        batch_size: int = 256,
    ) -> None:
        if not model.config.has_dense_head:
            raise InputError(
                f"{name} retrieval needs a model with a dense head; this one was trained with "
                "RetrievalModelConfig.embedding_loss_weight = 0. Use mode generative, or train with a weight above 0."
            )
        super().__init__(model, name=name, max_history=max_history, batch_size=batch_size)
        self._retrieval_model = model
        self._projected = ProjectedItems.of(model, items)
        self._take_over(tokenizer, None)

    def refresh(self, tokenizer: SemanticIdTokenizer, items: ItemTable | None = None) -> None:
        """Take over a catalogue to which items were added or from which some were removed.

        Args:
            tokenizer: of the new catalogue.
            items: of the new catalogue; None where no features have changed.

        Raises:
            InputError: if tokenizer and items do not fit the model or each other; the ranker stays as it was.
        """
        self._take_over(tokenizer, items)

    def _take_over(self, tokenizer: SemanticIdTokenizer, items: ItemTable | None) -> None:
        model = self._retrieval_model
        check_codes(type(self).__name__, model, tokenizer)
        self._projected.check_rows(len(tokenizer.semantic_ids), items)
        tokenize = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary, language=model.language)
        if items is not None:
            self._projected.refresh(items)
        self._tokenize = tokenize
        self._available_items = tokenizer.available

    def _queries(self, histories: SeqBatch) -> Tensor:
        tokens = self._tokenize.to(histories.item_ids.device)(histories)
        return self._retrieval_model.queries(tokens, self._projected.vectors())

    def _vectors(self) -> Tensor:
        return self._projected.unit()

    def _available(self) -> Tensor | None:
        if self._available_items is None:
            return None
        return self._available_items.to(next(self.model.parameters()).device)
