"""Filters from flags, which are easier to write and to compare."""

from torch import Tensor

from data.schemas import ItemFilter


def filter_of(flags: Tensor, num_rows: int) -> ItemFilter:
    """The items that [N] flags for all rows, or [num_rows, N] flags per row, are true for."""
    if flags.dim() == 1:
        return ItemFilter.for_all(flags, num_rows)
    assert len(flags) == num_rows
    return ItemFilter.from_lists([row.nonzero().flatten().tolist() for row in flags], only=[True] * num_rows)
