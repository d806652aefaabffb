"""Hybrid retrieval: what beam search finds, united with all cold items, ranked by the dense head."""

import torch
from torch import Tensor

from data.schemas import NO_ITEM, InputError, ItemFilter, SeqBatch
from modules.catalogue_search import rank_items, search_catalogue
from modules.dense.ranker import DenseRanker
from modules.generation.ranker import GenerativeRanker
from modules.item_table import ItemTable
from modules.ranking import check_settings
from modules.tokenizer.tokenizer import SemanticIdTokenizer


class HybridRanker(DenseRanker):
    """Ranks the likeliest beams and all cold items by cosine, each item once (Yang et al. 2024, "LIGER").

    A list is no longer than there are candidates: K beams and the cold items that the row may get.

    Args:
        generative: finds the beams, of a model with a dense head; model and settings are its own.
        tokenizer: the one of `generative`.
        num_beams: K, how many of the items that beam search finds are taken.

    Raises:
        InputError: if num_beams is below 1 or above the beam width, or the model has no dense head.
    """

    def __init__(self, generative: GenerativeRanker, tokenizer: SemanticIdTokenizer, *, num_beams: int = 20) -> None:
        check_settings("HybridRanker", num_beams=num_beams)
        self._generative = generative
        self._num_beams = num_beams
        super().__init__(
            generative.model,
            tokenizer,
            generative.projected,
            name=f"hybrid@{num_beams}",
            max_history=generative.max_history,
            batch_size=generative.batch_size,
        )
        if num_beams > generative.beam_width:
            raise InputError(
                f"hybrid@{num_beams} takes the first {num_beams} of only {generative.beam_width} beams. "
                f"Give --beam-width {num_beams}, or a smaller K."
            )

    @property
    def beam_width(self) -> int:
        """Prefixes kept per step of the search for beams."""
        return self._generative.beam_width

    def refresh(self, tokenizer: SemanticIdTokenizer, items: ItemTable | None = None) -> None:
        """See `DenseRanker.refresh`."""
        self._generative.refresh(tokenizer, items)
        super().refresh(tokenizer, items)

    def _best(
        self, queries: Tensor, vectors: Tensor, k: int, histories: SeqBatch, allowed: ItemFilter | None
    ) -> tuple[Tensor, Tensor]:
        cold = self._projected.cold.to(vectors.device)
        available = self._available()
        open_cold = cold if available is None else cold & available
        found = search_catalogue(queries, vectors, k, allowed, open_cold, ranker=self.name)[0]
        beams = self._generative.rank(histories, self._num_beams, allowed)[0]
        beams = beams.masked_fill(cold[beams.clamp(min=0)], NO_ITEM)  # found already, if they are among the best
        return rank_items(queries, vectors, torch.cat([found, beams], dim=1), k, ranker=self.name)
