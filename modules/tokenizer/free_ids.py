"""Which tuples of codes are still free, prefix by prefix."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from data.schemas import InputError

Costs = Callable[[int, list[int]], np.ndarray]
"""(level, the codes of the levels before) -> [K] what each code of that level costs; NaN counts as most."""

_NO_ROWS = np.empty(0, dtype=np.int64)


class FreeIds:
    """Gives out tuples of codes, each once, the nearest first.

    A prefix is looked at only when it is asked for, so that a few ids in a large catalogue cost little. Memory grows
    with the prefixes looked at.

    Args:
        taken: [N, L] integers, distinct rows.
        sizes: codes per level.
    """

    def __init__(self, taken: np.ndarray, sizes: Sequence[int]) -> None:
        narrow = np.uint16 if max(sizes) <= 1 << 16 else np.int64  # numpy sorts 16 bits in linear time
        self._columns = np.ascontiguousarray(taken.T.astype(narrow))
        self._sizes = tuple(sizes)
        self._capacities = [math.prod(sizes[depth:]) for depth in range(len(sizes) + 1)]
        self._root = self._prefix(0, np.arange(len(taken)))

    def take(self, nearest: Sequence[int], costs: Costs) -> list[int]:
        """The free id that is reached by taking, at every level, the cheapest code below which an id is free.

        So an item keeps the code of the last level, or takes the next-nearest free one; where all are taken it leaves
        the prefix by the next-nearest code of the level before, and so on up.

        Args:
            nearest: the L codes that are cheapest level by level, whether free or not.
            costs: asked where an item leaves its nearest codes; the lowest of equally cheap codes is taken.

        Returns:
            L codes, taken from now on.

        Raises:
            InputError: if no id is free.
        """
        path = self._path(nearest)
        ids, level = list(nearest), len(self._sizes) - 1
        if path[level].is_full[ids[level]]:
            while path[level].num_taken == self._capacities[level]:
                level -= 1
                if level < 0:
                    raise InputError(
                        f"all {self._capacities[0]:,} ids of codebooks of {self._sizes} codes are taken. Train a "
                        "tokenizer with larger codebooks or more levels, or use dedup codes."
                    )
            del ids[level:], path[level + 1 :]
            while len(ids) < len(self._sizes):
                ids.append(_cheapest_free(path[-1].is_full, costs(len(ids), ids)))
                if len(ids) < len(self._sizes):
                    path.append(self._below(path[-1], ids[-1]))
        self._count(path, ids)
        return ids

    def _path(self, codes: Sequence[int]) -> list["_Prefix"]:
        """The prefixes of 0 to L - 1 codes."""
        path = [self._root]
        for code in codes[:-1]:
            path.append(self._below(path[-1], code))
        return path

    def _below(self, prefix: "_Prefix", code: int) -> "_Prefix":
        if code not in prefix.below:
            rows = prefix.rows[prefix.bounds[code] : prefix.bounds[code + 1]]
            prefix.below[code] = self._prefix(prefix.depth + 1, rows)
        return prefix.below[code]

    def _prefix(self, depth: int, rows: np.ndarray) -> "_Prefix":
        codes, size = self._columns[depth][rows], self._sizes[depth]
        if depth == len(self._sizes) - 1:
            is_full = np.zeros(size, dtype=bool)
            is_full[codes] = True
            return _Prefix(depth, len(rows), is_full)
        counts = np.bincount(codes, minlength=size)
        bounds = np.concatenate([[0], counts.cumsum()])
        is_full = counts == self._capacities[depth + 1]
        return _Prefix(depth, len(rows), is_full, rows[codes.argsort(kind="stable")], bounds)

    def _count(self, path: list["_Prefix"], ids: list[int]) -> None:
        is_full = True
        for prefix, code in zip(reversed(path), reversed(ids), strict=True):
            prefix.is_full[code] = is_full
            prefix.num_taken += 1
            is_full = prefix.num_taken == self._capacities[prefix.depth]


class _Prefix:
    """The ids that begin with some codes.

    `rows`, sorted by the next code, and `bounds` [K + 1] are empty where the next level is the last.
    """

    __slots__ = ("below", "bounds", "depth", "is_full", "num_taken", "rows")

    def __init__(
        self,
        depth: int,
        num_taken: int,
        is_full: np.ndarray,
        rows: np.ndarray = _NO_ROWS,
        bounds: np.ndarray = _NO_ROWS,
    ) -> None:
        self.depth = depth
        self.num_taken = num_taken
        self.is_full = is_full
        self.rows = rows
        self.bounds = bounds
        self.below: dict[int, _Prefix] = {}


def _cheapest_free(is_full: np.ndarray, costs: np.ndarray) -> int:
    free = (~is_full).nonzero()[0]
    costs_of_free = costs[free]
    place = int(costs_of_free.argmin())
    if math.isnan(costs_of_free[place]):  # argmin takes NaN for the least
        place = int(np.nan_to_num(costs_of_free, nan=np.inf).argmin())
    return int(free[place])
