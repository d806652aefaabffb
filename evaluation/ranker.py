"""The one contract above the models: anything that ranks items for histories is a Ranker.

Tie policy: a ranker returns a definite list, and its order counts. Where a ranker's scores tie, the lowest item id
comes first, or from a generative ranker the lowest code tuple, so that two runs give one answer.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from data.schemas import NO_ITEM, ItemFilter, SeqBatch
from modules.top_items import nan_scores_error


@runtime_checkable
class Ranker(Protocol):
    """Ranks the whole catalogue for a batch of histories, the same way at every call."""

    @property
    def name(self) -> str:
        """First part of the ranker's metric keys, for instance "generative"; an attribute will do."""
        ...

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """Best k items per row, best first.

        Args:
            histories: B rows, on any device; rows may be empty.
            k: length of the lists.
            allowed: of the B rows, the items that may be listed; None allows all.

        Returns:
            [B, k] int64 item ids, distinct within a row, and [B, k] float32 scores, never rising within a row.
            Lists shorter than k end in -1 (NO_ITEM) with score -inf.
        """
        ...


def check_ranking(ranker: str, item_ids: Tensor, scores: Tensor, *, num_rows: int, k: int, num_items: int) -> None:
    """Hold what a ranker returned against the contract.

    Args:
        ranker: named in errors.
        item_ids: what it returned.
        scores: what it returned beside them.
        num_rows: rows that it was given.
        k: list length that it was asked for.
        num_items: size of the catalogue.

    Raises:
        InputError: if a score is NaN: comparisons with NaN are false, so such a list says nothing.
        ValueError: if a shape, a dtype, an id, the padding or the order breaks the contract.
    """
    expected = (num_rows, k)
    for name, tensor, dtype in (("item_ids", item_ids, torch.int64), ("scores", scores, torch.float32)):
        if tuple(tensor.shape) != expected or tensor.dtype != dtype:
            raise ValueError(
                f"ranker {ranker!r}: expected {name} of shape {list(expected)} and {dtype}, "
                f"got {list(tensor.shape)} and {tensor.dtype}. Pad lists shorter than k with -1 and -inf."
            )
    if bool(scores.isnan().any()):
        raise nan_scores_error(ranker)
    _check_rows(ranker, (item_ids < NO_ITEM) | (item_ids >= num_items), item_ids, f"item ids in [-1, {num_items})")
    padding = item_ids == NO_ITEM
    _check_rows(ranker, padding != (scores == -torch.inf), item_ids, "score -inf exactly where the item id is -1")
    _check_rows(ranker, padding[:, :-1] & ~padding[:, 1:], item_ids, "-1 only at the end of a list")
    _check_rows(ranker, scores[:, :-1] < scores[:, 1:], scores, "scores that never rise within a row")
    ordered = item_ids.sort(dim=1).values
    repeated = (ordered[:, :-1] == ordered[:, 1:]) & (ordered[:, :-1] != NO_ITEM)
    _check_rows(ranker, repeated, item_ids, "distinct items within a row")


def _check_rows(ranker: str, wrong: Tensor, shown: Tensor, expected: str) -> None:
    rows = wrong.any(dim=1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"ranker {ranker!r}: expected {expected}; row {rows[0]} of the batch is {shown[rows[0]].tolist()}."
        )
