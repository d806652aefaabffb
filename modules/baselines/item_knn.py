"""What was bought together: nearest neighbours among items."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Histories, Ranges
from modules.baselines.counted import CountedConfig, CountedRanker, last_per_row, require
from modules.top_items import top_items

_BLOCK_ITEMS = 512
"""Items whose similarities to the whole catalogue are held densely at a time."""


@dataclass(frozen=True, kw_only=True)
class ItemKNNConfig(CountedConfig):
    """How items become neighbours, and how a history's items vote.

    The defaults were chosen on the validation roles of Amazon Beauty and Sports; the test roles had no part in it.

    Attributes:
        decay: weight of an item relative to the one after it, in (0, 1]; 1 weighs the whole history alike.
        shrinkage: not negative; 0 is the plain cosine.
        num_neighbours: kept per item.
        max_user_items: training items per user, the last ones, that are counted; bounds the work, which grows with the
            square of it.

    Raises:
        InputError: if a value is out of its range.
    """

    decay: float = 0.7
    shrinkage: float = 20.0
    num_neighbours: int = 200
    max_user_items: int = 200

    def __post_init__(self) -> None:
        require(
            self,
            decay=0 < self.decay <= 1,
            shrinkage=self.shrinkage >= 0,
            num_neighbours=self.num_neighbours >= 1,
            max_user_items=self.max_user_items >= 1,
        )


class ItemKNNRanker(CountedRanker):
    """Items that were bought by the users of the history's items (Sarwar et al. 2001), recent ones counting more.

    score(j) = sum over the history of decay^age * sim(i, j), age 0 being the last item and
    sim(i, j) = users(i and j) / (sqrt(users(i) users(j)) + shrinkage): the cosine of the items' user vectors, shrunk
    towards 0 where few users speak for it. An item is no neighbour of itself. Items without a neighbour in the
    history have no score and are not listed, so that lists can be short.

    Attributes:
        neighbours: [N, M] int32 item ids, most similar first, padded with NO_ITEM; M is at most N.
        similarities: [N, M] float32, 0 where padded.
    """

    name = "item_knn"
    neighbours: Tensor
    similarities: Tensor

    def __init__(self, config: ItemKNNConfig) -> None:
        super().__init__(config)
        shape = (config.num_items, min(config.num_neighbours, config.num_items))
        self.register_buffer("neighbours", torch.full(shape, NO_ITEM, dtype=torch.int32))
        self.register_buffer("similarities", torch.zeros(shape))

    @classmethod
    def fit(
        cls, histories: Histories, ranges: Ranges, num_items: int, config: ItemKNNConfig = ItemKNNConfig()
    ) -> "ItemKNNRanker":
        """See `CountedRanker.fit`."""
        ranker = cls(replace(config, num_items=num_items))
        rows, item_ids = last_per_row(*ranges.interactions(histories), config.max_user_items)
        ranker.neighbours, ranker.similarities = _nearest(
            rows, item_ids, num_items, config.shrinkage, ranker.neighbours.shape[1]
        )
        return ranker

    def _scores(self, recent: Tensor, users: Tensor) -> Tensor:
        num_rows, num_items = len(recent), self.config.num_items
        scores = torch.zeros(num_rows * num_items, dtype=torch.float64, device=recent.device)
        for age in reversed(range(recent.shape[1])):  # one age at a time: no cell gets two votes, whose order is open
            rows = (recent[:, age] != NO_ITEM).nonzero()
            item_ids = recent[rows[:, 0], age]
            cells = rows * num_items + self.neighbours[item_ids].clamp(min=0)
            votes = self.config.decay**age * self.similarities[item_ids].double()
            scores.scatter_add_(0, cells.flatten(), votes.flatten())
        scores = scores.view(num_rows, num_items).float()
        return scores.masked_fill(scores <= 0, -torch.inf)


def _nearest(
    rows: Tensor, item_ids: Tensor, num_items: int, shrinkage: float, num_neighbours: int
) -> tuple[Tensor, Tensor]:
    """Neighbours and similarities per item, from a sparse users-by-items matrix, a block of items at a time."""
    import scipy.sparse  # only here, so that ranking does not need it

    num_rows = int(rows.max()) + 1 if len(rows) else 0
    ones = torch.ones(len(rows), dtype=torch.float32)
    users = scipy.sparse.csr_matrix((ones.numpy(), (rows.numpy(), item_ids.numpy())), shape=(num_rows, num_items))
    users.data[:] = 1.0  # an item bought twice by a user counts once
    items = users.T.tocsr()
    norms = torch.from_numpy(users.getnnz(axis=0)).float().sqrt()
    neighbours = torch.empty(num_items, num_neighbours, dtype=torch.int32)
    similarities = torch.empty(num_items, num_neighbours)
    for begin in range(0, num_items, _BLOCK_ITEMS):
        block = slice(begin, begin + _BLOCK_ITEMS)
        together = torch.from_numpy((items[block] @ users).toarray())
        similarity = together / (norms[block, None] * norms + shrinkage).clamp(min=1e-9)
        similarity.diagonal(offset=begin).zero_()
        similarity.masked_fill_(similarity <= 0, -torch.inf)
        neighbours[block], similarities[block] = top_items(similarity, num_neighbours)
    return neighbours, similarities.clamp(min=0)
