"""Rankers that score an item by the dot product of its vector with one of the history."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from data.schemas import InputError, ItemFilter, SeqBatch
from modules.catalogue_search import search_catalogue
from modules.ranking import check_settings, evaluation_mode, last_items, parts_of
from modules.sequential.next_item import NextItemModel


class VectorRanker:
    """Lists the items whose vectors have the largest dot products with a history's, found exactly.

    A subclass says what the vectors are.

    Args:
        model: used in evaluation mode on whatever device it lies at the time of a call.
        name: of the ranker.
        max_history: only a row's last items up to this number are read.
        batch_size: histories that the model reads at once.

    Raises:
        InputError: if a number is below 1.
    """

    def __init__(self, model: nn.Module, *, name: str, max_history: int = 20, batch_size: int = 256) -> None:
        check_settings(type(self).__name__, max_history=max_history, batch_size=batch_size)
        self.model = model
        self.name = name
        self.max_history = max_history
        self.batch_size = batch_size

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """The k items of largest dot product per history; see `Ranker.rank`. Results lie where the histories lie.

        Raises:
            ValueError: if `allowed` is of other rows, or its flags of another catalogue.
            InputError: if the model's vectors are not finite.
        """
        device, home = next(self.model.parameters()).device, histories.item_ids.device
        histories = replace(histories, targets=None).to(device)
        allowed = None if allowed is None else allowed.to(device)
        with torch.no_grad(), evaluation_mode(self.model):
            vectors = self._vectors()
            queries = self._queries_in_parts(histories, vectors.shape[1])
            item_ids, scores = self._best(queries, vectors, k, histories, allowed)
        return item_ids.to(home), scores.to(home)

    def _queries(self, histories: SeqBatch) -> Tensor:
        """[B, D] of rows of at most max_history items on the model's device; zeros where a row is empty."""
        raise NotImplementedError

    def _vectors(self) -> Tensor:
        """[N, D] on the model's device."""
        raise NotImplementedError

    def _available(self) -> Tensor | None:
        """[N] bool on the model's device, the items that may be listed; None is all."""
        return None

    def _best(
        self, queries: Tensor, vectors: Tensor, k: int, histories: SeqBatch, allowed: ItemFilter | None
    ) -> tuple[Tensor, Tensor]:
        """What `rank` returns for queries [B, D] of some histories."""
        return search_catalogue(queries, vectors, k, allowed, self._available(), ranker=self.name)

    def _queries_in_parts(self, histories: SeqBatch, width: int) -> Tensor:
        """[B, width] fp32."""
        queries = torch.empty(len(histories), width, device=histories.item_ids.device)
        for rows, part in parts_of(last_items(histories, self.max_history), self.batch_size):
            queries[rows] = self._queries(part).float()
        return queries


class SequenceRanker(VectorRanker):
    """Ranks by a sequence model: its state at the end of a history against its item vectors.

    Args:
        model: of one vector per item.
        max_history: only a row's last items up to this number are read; None is the model's own.
        batch_size: histories that the model reads at once.

    Raises:
        InputError: if a number is below 1, or max_history above the model's own.
    """

    def __init__(self, model: NextItemModel, *, max_history: int | None = None, batch_size: int = 256) -> None:
        longest = model.config.max_history
        max_history = longest if max_history is None else max_history
        if max_history > longest:
            raise InputError(
                f"SequenceRanker expected max_history of at most {longest}, which the model was trained with, "
                f"got {max_history}."
            )
        super().__init__(model, name=model.name, max_history=max_history, batch_size=batch_size)
        self._sequence_model = model

    def _queries(self, histories: SeqBatch) -> Tensor:
        return self._sequence_model.queries(histories)

    def _vectors(self) -> Tensor:
        return self._sequence_model.item_vectors()
