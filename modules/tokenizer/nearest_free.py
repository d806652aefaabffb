"""Items of equal codes told apart: all but one of them move to free tuples close by (MQL4GRec, arXiv 2504.05314)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.tokenizer.collisions import sharing_items, sharing_rows, sorted_groups
from modules.tokenizer.free_ids import FreeIds

Costs = Callable[[Tensor, Tensor, int], Tensor]
"""(item ids [R], their codes [R, L], level) -> [R, K] what the codes of that level cost, after those before it."""

CostsOf = Callable[[Tensor], Costs]
"""Makes the costs of some items, given by ascending item ids [R]."""

_BLOCK = 4096
"""Items whose costs are held at once."""


def separated(codes: Tensor, sizes: Sequence[int], costs_of: CostsOf) -> Tensor:
    """Ids that no two items share, changing as few items as possible: N less the number of distinct tuples.

    Of the items on one tuple that with the smallest cost at the last level keeps it. The others, groups in
    lexicographic order and within one by cost, then item id, each take the nearest free id, see `FreeIds.take`.
    O(N log N) and, for the items moved, O(K) each.

    Args:
        codes: [N, L] int64, the nearest codes of every item.
        sizes: codes per level.
        costs_of: called once, for the items that share their codes, if any.

    Returns:
        [N, L] int64.

    Raises:
        InputError: if there are more items than ids.
    """
    sharing = sharing_items(codes)
    if len(sharing) == 0:
        return codes
    costs = costs_of(sharing)
    moving = _moving_items(sharing, codes, costs)
    stays = np.ones(len(codes), dtype=bool)
    stays[moving.numpy()] = False
    free = FreeIds(codes.cpu().numpy()[stays], sizes)
    result = codes.clone()
    result[moving] = _taken(free, moving, codes[moving], costs)
    return result


def joined(semantic_ids: Tensor, codes: Tensor, sizes: Sequence[int], costs_of: CostsOf) -> Tensor:
    """Ids of items that join a catalogue, one by one, each the nearest that is free by then.

    Args:
        semantic_ids: [N, L] int64 of the catalogue, distinct.
        codes: [M, L] int64, the nearest codes of the items that join.
        sizes: codes per level.
        costs_of: called once, where anything collides, for the rows 0 to M - 1 of the items that join.

    Returns:
        [M, L] int64.

    Raises:
        InputError: if there are more items than ids.
    """
    if not _collide(semantic_ids, codes, sizes):
        return codes
    item_ids = torch.arange(len(codes))
    return _taken(FreeIds(semantic_ids.cpu().numpy(), sizes), item_ids, codes, costs_of(item_ids))


def _collide(semantic_ids: Tensor, codes: Tensor, sizes: Sequence[int]) -> bool:
    """Whether codes [M, L] have an equal in the catalogue or among themselves; no sort of the catalogue."""
    if len(codes) == 0:
        return False
    rows, _, tuples = sharing_rows(semantic_ids, codes, sizes)
    return len(rows) > 0 or len(tuples.unique()) < len(tuples)


@dataclass(frozen=True)
class _CostsOfItem:
    """The costs of one item as `FreeIds.take` asks for them.

    Attributes:
        item_id: [1].
        nearest: its nearest codes.
        at_last: [K] costs of the last level's codes behind those.
        costs: of all items.
    """

    item_id: Tensor
    nearest: list[int]
    at_last: np.ndarray
    costs: Costs

    def __call__(self, level: int, prefix: list[int]) -> np.ndarray:
        if prefix == self.nearest[:-1]:
            return self.at_last
        return self.costs(self.item_id, torch.tensor([prefix], dtype=torch.int64), level)[0].numpy()


def _moving_items(sharing: Tensor, codes: Tensor, costs: Costs) -> Tensor:
    """[M] int64 ids of the items that move, in that order, given all that share their codes."""
    last = codes.shape[1] - 1
    own = [
        costs(item_ids, codes[item_ids], last).gather(1, codes[item_ids][:, last:])
        for item_ids in sharing.split(_BLOCK)
    ]
    order, starts = sorted_groups(codes[sharing])
    group = np.empty_like(order)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    order = np.lexsort((torch.cat(own)[:, 0].numpy(), group))  # stable: equal costs keep the order of their item ids
    follows = group[order][1:] == group[order][:-1]
    return sharing[torch.from_numpy(order[1:][follows])]


def _taken(free: FreeIds, item_ids: Tensor, codes: Tensor, costs: Costs) -> Tensor:
    """[M, L] ids for items in turn, given their nearest codes [M, L]."""
    ids: list[list[int]] = []
    for block, nearest in zip(item_ids.split(_BLOCK), codes.split(_BLOCK), strict=True):
        at_last = costs(block, nearest, codes.shape[1] - 1).numpy()
        for item_id, own, row in zip(block.split(1), nearest.tolist(), at_last, strict=False):
            ids.append(free.take(own, _CostsOfItem(item_id, own, row, costs)))
    return torch.tensor(ids, dtype=torch.int64).reshape(codes.shape)
