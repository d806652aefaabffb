"""The items whose vectors have the largest dot products with a query: exact, whatever the size of the catalogue.

A product of matrices in fp32 gives a score that depends on the other rows and columns, in its last bits. So products
only find candidates, a few more than are asked for. What is returned, and decides the order, is the score of
`score_items`, a function of the two vectors alone. That no item outside the candidates can belong to the list follows
from the error bound of a dot product; the few rows where it does not follow are searched again, more thoroughly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import NO_ITEM, ItemFilter
from modules.largest import GROUP, largest
from modules.ranking import check_filter
from modules.top_items import nan_scores_error, top_items

_SPARE_CANDIDATES = 12
"""Candidates beyond k: enough for what lies within rounding of the last place, in all but odd catalogues."""

_BLOCK_ITEMS = 1 << 15
"""Items that are scored at once."""

_BLOCK_CELLS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Queries times items that are scored at once."""

_BLOCK_PAIRS = {"cpu": 1 << 11, "cuda": 1 << 19}
"""Pairs of a query and an item that `score_items` multiplies at once."""


@torch.no_grad()
def search_catalogue(
    queries: Tensor,
    vectors: Tensor,
    k: int,
    allowed: ItemFilter | None = None,
    available: Tensor | None = None,
    *,
    ranker: str,
) -> tuple[Tensor, Tensor]:
    """The k items of largest dot product per query, the lowest item id first where scores are equal.

    The result is the same for every division into batches, in memory of a few blocks of scores.

    Args:
        queries: [B, D] float.
        vectors: [N, D] float, on the same device, as are the following.
        k: length of the lists, may exceed N.
        allowed: of the B rows, the items that may be listed; None allows all.
        available: [N] bool, the items that any row may get; None is all.
        ranker: named in errors.

    Returns:
        item_ids [B, k] int64 and scores [B, k] fp32, as `score_items` gives them, filled up with -1 and -inf.

    Raises:
        ValueError: if the queries are of another width than the vectors, or flags of other items.
        InputError: if a query, or the vector of an item that may be listed, holds NaN or overflows.
    """
    _check_shapes(queries, vectors, allowed, available)
    with torch.autocast(queries.device.type, enabled=False):
        search = _Search(queries.float(), vectors.float(), _Permitted.of(len(vectors), allowed, available), ranker)
        return search.top(k)


@torch.no_grad()
def score_items(queries: Tensor, vectors: Tensor, item_ids: Tensor) -> Tensor:
    """Dot products of every query with its own items.

    A score is the sum of the products in fp64, added in a fixed order and rounded to fp32 once: a function of the two
    vectors alone, the same on every device.

    Args:
        queries: [B, D] float.
        vectors: [N, D] float.
        item_ids: [B, C] int64, with NO_ITEM for none.

    Returns:
        [B, C] fp32, -inf for NO_ITEM.
    """
    num_rows, width = item_ids.shape
    item_ids = item_ids.reshape(-1)
    rows = torch.arange(num_rows, device=queries.device).repeat_interleave(width, output_size=len(item_ids))
    scores = torch.empty(len(item_ids), device=queries.device)
    size = _BLOCK_PAIRS[queries.device.type]
    for begin in range(0, len(item_ids), size):
        part = slice(begin, begin + size)
        products = queries[rows[part]].double().mul_(vectors[item_ids[part].clamp(min=0)])
        scores[part] = _row_sums_(products)
    return scores.masked_fill_(item_ids == NO_ITEM, -torch.inf).view(num_rows, width)


def rank_items(queries: Tensor, vectors: Tensor, item_ids: Tensor, k: int, *, ranker: str) -> tuple[Tensor, Tensor]:
    """The best of every query's own items, the lowest item id first where scores are equal.

    Args:
        queries: [B, D] float.
        vectors: [N, D] float.
        item_ids: [B, C] int64, distinct but for NO_ITEM.
        k: length of the lists, may exceed C.
        ranker: named in errors.

    Returns:
        item_ids [B, k] int64 and scores [B, k] fp32, as `score_items` gives them, filled up with -1 and -inf.

    Raises:
        InputError: if a score is NaN.
    """
    item_ids = item_ids.sort(dim=1).values
    places, scores = top_items(score_items(queries, vectors, item_ids), k, ranker=ranker)
    return item_ids.gather(1, places.clamp(min=0)).masked_fill_(places == NO_ITEM, NO_ITEM), scores


def _row_sums_(values: Tensor) -> Tensor:
    """[P] sums of values [P, D], which are used up, halves added to halves."""
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0] if values.shape[1] else values.sum(1)


@dataclass(frozen=True, eq=False)
class _Permitted:
    """Which items the rows may get, in columns: places among the items that any row may get.

    Attributes:
        item_ids: [M] int64 rising, of every column; None where that is every item.
        num_columns: M.
        sets: the rows' sets, their item ids replaced by columns, or -1; None where there are no sets.
        rows: [T] int64, the row of each of these.
        bounds: offsets of the sets on the host.
        any_only: whether a row may get nothing but its set.
    """

    item_ids: Tensor | None
    num_columns: int
    sets: ItemFilter | None = None
    rows: Tensor | None = None
    bounds: tuple[int, ...] = ()
    any_only: bool = False

    @classmethod
    def of(cls, num_items: int, allowed: ItemFilter | None, available: Tensor | None) -> "_Permitted":
        """From the arguments of `search_catalogue`."""
        flags = available
        if allowed is not None and allowed.allowed is not None:
            flags = allowed.allowed if flags is None else flags & allowed.allowed
        item_ids = None if flags is None else flags.nonzero().squeeze(1)
        num_columns = num_items if item_ids is None else len(item_ids)
        if item_ids is not None and num_columns == num_items:
            item_ids = None
        any_only = allowed is not None and bool(allowed.only.any())
        if allowed is None or (len(allowed.item_ids) == 0 and not any_only):
            return cls(item_ids, num_columns)
        bounds = tuple(allowed.offsets.tolist())
        columns = allowed.item_ids[: bounds[-1]]
        if item_ids is not None:
            column_of_item = torch.full((num_items,), -1, device=item_ids.device)
            column_of_item[item_ids] = torch.arange(num_columns, device=item_ids.device)
            columns = column_of_item[columns]
        rows = torch.repeat_interleave(allowed.offsets.long().diff(), output_size=bounds[-1])
        sets = ItemFilter(columns, allowed.offsets, allowed.only)
        return cls(item_ids, num_columns, sets, rows, bounds, any_only)

    def items(self, columns: Tensor) -> Tensor:
        """Item ids of columns."""
        return columns if self.item_ids is None else self.item_ids[columns]

    def vectors(self, vectors: Tensor, columns: range) -> Tensor:
        """Rows of `vectors` [N, D] that belong to consecutive columns."""
        if self.item_ids is None:
            return vectors[columns.start : columns.stop]
        return vectors[self.item_ids[columns.start : columns.stop]]

    def mask_(self, scores: Tensor, rows: range, columns: range) -> Tensor:
        """Put -inf into scores of consecutive rows and columns where a row may not get the item."""
        if self.sets is None or self.rows is None:
            return scores
        part = slice(self.bounds[rows.start], self.bounds[rows.stop])
        places = self.sets.item_ids[part] - columns.start
        inside = ((places >= 0) & (places < len(columns))).nonzero().squeeze(1)
        listed = self.rows[part][inside] - rows.start, places[inside]
        if not self.any_only:
            scores[listed] = -torch.inf
            return scores
        only = self.sets.only[rows.start : rows.stop]
        kept = scores[listed].masked_fill(~only[listed[0]], -torch.inf)
        scores.masked_fill_(only[:, None], -torch.inf)
        scores[listed] = kept
        return scores


class _Search:
    """Of some queries in a catalogue; all fp32."""

    def __init__(self, queries: Tensor, vectors: Tensor, permitted: _Permitted, ranker: str) -> None:
        self._queries, self._vectors, self._permitted, self._ranker = queries, vectors, permitted, ranker
        self._blocks = _blocks(permitted.num_columns, _BLOCK_ITEMS)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """What `search_catalogue` returns."""
        if k == 0 or len(self._queries) == 0 or self._permitted.num_columns == 0:
            return self._nothing(k)
        columns, values, longest = self._candidates(min(k + _SPARE_CANDIDATES, self._permitted.num_columns))
        columns = columns.clamp(max=self._permitted.num_columns - 1)  # products of -inf may lie behind the last one
        found = self._permitted.items(columns).masked_fill(values == -torch.inf, NO_ITEM)
        item_ids, scores = rank_items(self._queries, self._vectors, found, k, ranker=self._ranker)
        error = self._rounding(longest)
        if columns.shape[1] == self._permitted.num_columns:
            return item_ids, scores
        # What was left out has at most the last candidate's product, up to rounding; -inf if nothing was.
        beyond = values.amin(dim=1)
        certain = beyond.isneginf() | (scores[:, -1] > (beyond + error).float())
        for row in (~certain).nonzero().squeeze(1).tolist():
            lowest = scores[row, -1] - error[row]
            item_ids[row : row + 1], scores[row : row + 1] = self._thorough(row, lowest, k)
        return item_ids, scores

    def _nothing(self, k: int) -> tuple[Tensor, Tensor]:
        """Empty lists."""
        shape, device = (len(self._queries), k), self._queries.device
        return torch.full(shape, NO_ITEM, device=device), torch.full(shape, -torch.inf, device=device)

    def _candidates(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Columns and products [B, width] of the largest products, those of -inf being none, and the longest vector."""
        shape, device = (len(self._queries), width), self._queries.device
        best = torch.zeros(shape, dtype=torch.int64, device=device)
        values = torch.full(shape, -torch.inf, device=device)
        longest = torch.zeros((), dtype=torch.float64, device=device)
        for columns in self._blocks:
            vectors = self._permitted.vectors(self._vectors, columns)
            longest = torch.maximum(longest, _lengths(vectors).amax())
            padded = -(-len(columns) // GROUP) * GROUP
            num_rows = min(max(_BLOCK_CELLS[device.type] // padded, 1), len(self._queries))
            buffer = torch.empty(num_rows, padded, device=device)
            buffer[:, len(columns) :] = -torch.inf
            for rows in _blocks(len(self._queries), num_rows):
                part, products = slice(rows.start, rows.stop), buffer[: len(rows)]
                torch.mm(self._queries[part], vectors.T, out=products[:, : len(columns)])
                self._permitted.mask_(products, rows, columns)
                found, places = largest(products, min(width, len(columns)))
                values[part], order = torch.cat([values[part], found], dim=1).topk(width, dim=1, sorted=False)
                best[part] = torch.cat([best[part], places + columns.start], dim=1).gather(1, order)
        return best, values, longest

    def _rounding(self, longest: Tensor) -> Tensor:
        """[B] fp64: bound of what a product, and a score, may differ from the exact dot product.

        The bound of Higham 2002 ("Accuracy and Stability of Numerical Algorithms", eq. 3.5) for sums in any order.

        Raises:
            InputError: if there may be numbers that are not finite.
        """
        largest = _lengths(self._queries) * longest
        if not bool((largest < torch.finfo(torch.float32).max).all()):
            raise nan_scores_error(self._ranker)
        width = self._queries.shape[1]
        inputs = 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
        relative = 1.01 * (width + 8) * 2.0**-24 + inputs
        return relative * largest + width * 2.0**-120

    def _thorough(self, row: int, lowest: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Item ids and scores [1, k] of a row, from all items whose product is at least `lowest`."""
        query, found = self._queries[row : row + 1], []
        all_equal = not bool(query.any())
        for columns in self._blocks:
            products = torch.mm(query, self._permitted.vectors(self._vectors, columns).T)
            self._permitted.mask_(products, range(row, row + 1), columns)
            found.append((products[0] >= lowest).nonzero().squeeze(1) + columns.start)
            if all_equal and sum(map(len, found)) >= k:  # of scores 0 the first k are the lowest item ids
                found = [torch.cat(found)[:k]]
                break
        candidates = self._permitted.items(torch.cat(found))[None]
        return rank_items(query, self._vectors, candidates, k, ranker=self._ranker)


def _blocks(size: int, block: int) -> list[range]:
    """0..size-1 in parts of at most `block`."""
    return [range(begin, min(begin + block, size)) for begin in range(0, size, block)]


def _lengths(vectors: Tensor) -> Tensor:
    """[N] fp64, at least the lengths of [N, D], but for rounding; NaN or infinite where they are or overflow."""
    too_small_to_square = vectors.shape[1] ** 0.5 * 2.0**-63
    return torch.linalg.vector_norm(vectors, dim=1).double() + too_small_to_square


def _check_shapes(queries: Tensor, vectors: Tensor, allowed: ItemFilter | None, available: Tensor | None) -> None:
    if queries.dim() != 2 or vectors.dim() != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"search_catalogue expected queries [B, D] and vectors [N, D], got {list(queries.shape)} and "
            f"{list(vectors.shape)}."
        )
    if allowed is not None:
        check_filter(allowed, num_rows=len(queries), num_items=len(vectors))
    if available is not None and len(available) != len(vectors):
        raise ValueError(f"search_catalogue expected flags of {len(vectors)} items, got {len(available)}.")
