"""What similar users bought: nearest neighbours among users."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Histories, Ranges
from modules.baselines.counted import CountedConfig, CountedRanker, last_per_row, require
from modules.top_items import top_items

_ONE = 1 << 32
"""Weights and votes are summed as whole multiples of its inverse: no sum depends on the order of its terms."""


@dataclass(frozen=True, kw_only=True)
class UserKNNConfig(CountedConfig):
    """How users become neighbours.

    The defaults were chosen on the validation roles of Amazon Beauty and Sports; the test roles had no part in it.

    Attributes:
        num_neighbours: training users that vote.
        shrinkage: not negative; 0 is the plain cosine.
        decay: weight of an item of the history relative to the one after it, in (0, 1]; 1 weighs all alike.
        max_user_items: training items per user, the last ones, that are counted.
        num_users: U, training users.
        num_interactions: P, their distinct items.

    Raises:
        InputError: if a value is out of its range.
    """

    filled = ("num_items", "num_users", "num_interactions")
    num_neighbours: int = 200
    shrinkage: float = 1.0
    decay: float = 0.6
    max_user_items: int = 200
    num_users: int = 0
    num_interactions: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            num_neighbours=self.num_neighbours >= 1,
            shrinkage=self.shrinkage >= 0,
            decay=0 < self.decay <= 1,
            max_user_items=self.max_user_items >= 1,
        )


class UserKNNRanker(CountedRanker):
    """Items of the training users whose items are most like the history's (Herlocker et al. 1999).

    sim(h, u) = w(h and u) / (|w(h)| sqrt(|u|) + shrinkage), w being decay^age of the history's items: with decay 1 the
    cosine of two sets, shrunk towards 0 where little speaks for it. score(j) = sum of sim(h, u) over the nearest users
    who have j; of users that are equally near, the first count. A user is no neighbour of themselves. Items of no
    neighbour are not listed, so that lists can be short.

    Attributes:
        users: [U] int64 hashes of the training users.
        user_offsets: [U+1] int64 boundaries of the users' items.
        user_items: [P] int32 distinct item ids per user.
        item_offsets: [N+1] int64 boundaries of the items' users.
        item_users: [P] int32 user numbers per item.
    """

    name = "user_knn"
    users: Tensor
    user_offsets: Tensor
    user_items: Tensor
    item_offsets: Tensor
    item_users: Tensor

    def __init__(self, config: UserKNNConfig) -> None:
        super().__init__(config)
        self.register_buffer("users", torch.zeros(config.num_users, dtype=torch.int64))
        self.register_buffer("user_offsets", torch.zeros(config.num_users + 1, dtype=torch.int64))
        self.register_buffer("item_offsets", torch.zeros(config.num_items + 1, dtype=torch.int64))
        for name in ("user_items", "item_users"):
            self.register_buffer(name, torch.zeros(config.num_interactions, dtype=torch.int32))

    @classmethod
    def fit(
        cls, histories: Histories, ranges: Ranges, num_items: int, config: UserKNNConfig = UserKNNConfig()
    ) -> "UserKNNRanker":
        """See `CountedRanker.fit`."""
        rows, item_ids = last_per_row(*ranges.interactions(histories), config.max_user_items)
        pairs = torch.unique(rows * num_items + item_ids)  # an item bought twice by a user counts once
        rows, item_ids = pairs // max(num_items, 1), pairs % max(num_items, 1)
        kept, numbers = torch.unique_consecutive(rows, return_inverse=True)
        ranker = cls(replace(config, num_items=num_items, num_users=len(kept), num_interactions=len(pairs)))
        ranker.users = histories.user_hashes[kept]
        ranker.user_offsets, ranker.user_items = _offsets(numbers, len(kept)), item_ids.int()
        by_item = item_ids.sort(stable=True).indices
        ranker.item_offsets, ranker.item_users = _offsets(item_ids, num_items), numbers[by_item].int()
        return ranker

    def _scores(self, recent: Tensor, users: Tensor) -> Tensor:
        similarity = self._similarity(_distinct(recent), users)
        nearest, weights = top_items(similarity, min(self.config.num_neighbours, self.config.num_users))
        votes = _sums(self.user_offsets, self.user_items, nearest, weights.double(), self.config.num_items)
        return (votes.float() / _ONE).masked_fill_(votes == 0, -torch.inf)

    def _similarity(self, recent: Tensor, users: Tensor) -> Tensor:
        """[B, U] fp32 of histories without repeated items, -inf where nothing is in common and for a row's own user."""
        ages = torch.arange(recent.shape[1], device=recent.device, dtype=torch.float64)
        weights = (self.config.decay**ages).expand(recent.shape).masked_fill(recent == NO_ITEM, 0.0)
        overlap = _sums(self.item_offsets, self.item_users, recent, weights, self.config.num_users)
        rows, others = overlap.nonzero(as_tuple=True)  # few pairs have anything in common
        norms = weights.square().sum(dim=1).sqrt()[rows] * self.user_offsets.diff().double().sqrt()[others]
        pairs = overlap[rows, others].double() / _ONE / (norms + self.config.shrinkage)
        pairs.masked_fill_((users[rows] == self.users[others]) & (users[rows] != 0), -torch.inf)
        similarity = torch.full(overlap.shape, -torch.inf, device=recent.device)
        similarity[rows, others] = pairs.float()
        return similarity

    def _cells_per_row(self, length: int) -> int:
        config = self.config
        most_users = int(self.item_offsets.diff().max()) if config.num_items else 0
        votes = config.num_neighbours * config.max_user_items
        return max(config.num_items, config.num_users, length * most_users, votes)


def _offsets(numbers: Tensor, size: int) -> Tensor:
    """[size + 1] int64 boundaries of equal numbers in what is sorted by them."""
    return torch.nn.functional.pad(torch.bincount(numbers, minlength=size).cumsum(0), (1, 0))


def _distinct(recent: Tensor) -> Tensor:
    """Every item of a row at its first place, NO_ITEM at its others."""
    values, order = recent.sort(dim=1, stable=True)
    repeated = torch.nn.functional.pad(values[:, 1:] == values[:, :-1], (1, 0))
    return recent.masked_fill(torch.empty_like(repeated).scatter_(1, order, repeated), NO_ITEM)


def _sums(offsets: Tensor, members: Tensor, lists: Tensor, weights: Tensor, size: int) -> Tensor:
    """Weights of chosen lists, summed per row over the members of the lists.

    Args:
        offsets: boundaries of all lists.
        members: of the lists, in 0..size-1, distinct within each.
        lists: [B, H] int64 numbers of lists, NO_ITEM for none.
        weights: [B, H] fp64.
        size: S.

    Returns:
        [B, S] int64 multiples of 1 / _ONE.
    """
    rows, places = (lists != NO_ITEM).nonzero(as_tuple=True)
    chosen, terms = lists[rows, places], (weights[rows, places] * _ONE).round().long()
    begins, lengths = offsets[chosen], offsets[chosen + 1] - offsets[chosen]
    shifts = torch.repeat_interleave(begins - lengths.cumsum(0) + lengths, lengths)
    found = members[torch.arange(len(shifts), device=shifts.device) + shifts]
    cells = torch.repeat_interleave(rows * size, lengths) + found
    sums = torch.zeros(len(lists) * size, dtype=torch.int64, device=lists.device)
    return sums.scatter_add_(0, cells, torch.repeat_interleave(terms, lengths)).view(-1, size)
