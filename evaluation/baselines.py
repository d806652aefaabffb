"""Baselines that need no training worth the name: what is popular, and what was bought together.

Both learn from the training ranges alone: neither validation nor test targets enter, whatever split is evaluated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Histories, InputError, ItemFilter, Ranges, SeqBatch
from evaluation.ranker import top_items
from evaluation.training_items import training_items

_BLOCK_ITEMS = 512
"""Items whose similarities to the whole catalogue are held densely at a time."""


@dataclass(frozen=True, eq=False)
class PopularityRanker:
    """The same list for everybody: items by their number of training interactions, ties by lowest item id.

    Attributes:
        counts: [N] int64 training interactions per item.
        order: [N] int64 item ids, most popular first.
    """

    counts: Tensor
    order: Tensor
    name: str = "popularity"

    @classmethod
    def fit(cls, histories: Histories, ranges: Ranges, num_items: int) -> "PopularityRanker":
        """Count the items of a split's training ranges."""
        counts = torch.bincount(training_items(histories, ranges)[1], minlength=num_items)
        return cls(counts, counts.sort(descending=True, stable=True).indices)

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """See `Ranker.rank`; scores are the counts."""
        num_rows, num_items = len(histories), len(self.counts)
        flags = torch.ones(1, 1, dtype=torch.bool) if allowed is None else allowed.to("cpu").flags(num_items)
        flags = flags.expand(num_rows, num_items)
        forbidden = num_items - int(flags.sum(dim=1).min()) if num_rows else 0
        candidates = self.order[: k + forbidden]  # enough that every row finds its k, and far fewer than N
        scores = self.counts[candidates].float().expand(num_rows, -1)
        columns, scores = top_items(scores, k, flags[:, candidates], ranker=self.name)
        return torch.where(columns == NO_ITEM, NO_ITEM, candidates[columns]), scores


@dataclass(frozen=True, eq=False)
class ItemKNNRanker:
    """Items that were bought by the users of the history's items (Sarwar et al. 2001), recent ones counting more.

    score(j) = sum over the history of decay^age * sim(i, j), age 0 being the last item and
    sim(i, j) = users(i and j) / (sqrt(users(i) users(j)) + shrinkage): the cosine of the items' user vectors, shrunk
    towards 0 where few users speak for it. An item is no neighbour of itself. Items without a neighbour in the
    history have no score and are not listed, so that lists can be short. The defaults were chosen on the validation
    roles of Amazon Beauty and Sports; the test roles had no part in it.

    Attributes:
        neighbours: [N, M] int64 item ids, most similar first, padded with -1.
        similarities: [N, M] float32, 0 where padded.
        decay: weight of an item relative to the one after it.
    """

    neighbours: Tensor
    similarities: Tensor
    decay: float
    name: str = "item_knn"

    @classmethod
    def fit(
        cls,
        histories: Histories,
        ranges: Ranges,
        num_items: int,
        *,
        decay: float = 0.7,
        shrinkage: float = 20.0,
        num_neighbours: int = 200,
        max_history: int = 200,
    ) -> "ItemKNNRanker":
        """Find every item's nearest neighbours in the training ranges.

        Args:
            histories: all interactions.
            ranges: the training role of a split.
            num_items: size of the catalogue.
            decay: in (0, 1]; 1 weighs the whole history alike.
            shrinkage: not negative; 0 is the plain cosine.
            num_neighbours: kept per item.
            max_history: training items per user, the last ones, that are counted; bounds the work, which grows with
                the square of it.

        Raises:
            InputError: if a parameter is out of its range.
        """
        if not 0 < decay <= 1 or shrinkage < 0 or num_neighbours < 1 or max_history < 1:
            raise InputError(
                "ItemKNNRanker.fit expected 0 < decay <= 1, shrinkage >= 0, num_neighbours >= 1 and max_history >= 1, "
                f"got decay={decay}, shrinkage={shrinkage}, num_neighbours={num_neighbours}, max_history={max_history}."
            )
        rows, item_ids = _last_per_row(*training_items(histories, ranges), max_history)
        neighbours, similarities = _nearest(rows, item_ids, num_items, shrinkage, min(num_neighbours, num_items))
        return cls(neighbours, similarities, decay)

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """See `Ranker.rank`."""
        offsets = histories.offsets.cpu().long()
        item_ids = histories.item_ids.cpu()[: offsets[-1]]
        rows = torch.repeat_interleave(offsets.diff())
        ages = offsets[1:][rows] - 1 - torch.arange(len(item_ids))
        weights = self.decay ** ages.double()
        num_rows, num_items = len(histories), len(self.neighbours)
        cells = rows.unsqueeze(1) * num_items + self.neighbours[item_ids].clamp(min=0)
        votes = weights.unsqueeze(1) * self.similarities[item_ids]
        scores = torch.zeros(num_rows * num_items, dtype=torch.float64)
        scores.scatter_add_(0, cells.flatten(), votes.flatten())
        scores = scores.view(num_rows, num_items).float()
        flags = None if allowed is None else allowed.to("cpu").flags(num_items)
        return top_items(scores.masked_fill(scores <= 0, -torch.inf), k, flags, ranker=self.name)


def _last_per_row(rows: Tensor, item_ids: Tensor, max_history: int) -> tuple[Tensor, Tensor]:
    """The last max_history items of each row; rows must be rising."""
    _, members = torch.unique_consecutive(rows, return_counts=True)
    ends = torch.repeat_interleave(members.cumsum(0), members)
    kept = ends - torch.arange(len(rows)) <= max_history
    return rows[kept], item_ids[kept]


def _nearest(
    rows: Tensor, item_ids: Tensor, num_items: int, shrinkage: float, num_neighbours: int
) -> tuple[Tensor, Tensor]:
    """Neighbours and similarities per item, from a sparse users-by-items matrix, a block of items at a time."""
    import scipy.sparse  # only here, so that evaluating other rankers does not need it

    num_rows = int(rows.max()) + 1 if len(rows) else 0
    ones = torch.ones(len(rows), dtype=torch.float32)
    users = scipy.sparse.csr_matrix((ones.numpy(), (rows.numpy(), item_ids.numpy())), shape=(num_rows, num_items))
    users.data[:] = 1.0  # an item bought twice by a user counts once
    items = users.T.tocsr()
    norms = torch.from_numpy(users.getnnz(axis=0)).float().sqrt()
    blocks = []
    for begin in range(0, num_items, _BLOCK_ITEMS):
        together = torch.from_numpy((items[begin : begin + _BLOCK_ITEMS] @ users).toarray())
        similarity = together / (norms[begin : begin + _BLOCK_ITEMS, None] * norms + shrinkage).clamp(min=1e-9)
        similarity.diagonal(offset=begin).zero_()
        similarity.masked_fill_(similarity <= 0, -torch.inf)
        blocks.append(top_items(similarity, num_neighbours))
    neighbours, similarities = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return neighbours, similarities.clamp(min=0)
