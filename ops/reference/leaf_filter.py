"""Which leaves of a trie each row may reach, without memory per row and leaf."""

from typing import NamedTuple

import torch
from torch import Tensor

_ROW_BITS = 32


class LeafFilter(NamedTuple):
    """A set of leaves per row, and the leaves that any row may reach.

    Attributes:
        offsets: [B+1] int32 boundaries of the rows' sets.
        leaves: [T] int32, ascending and distinct within a row, none that `allowed_before` rules out; those behind
            offsets[-1] belong to no row.
        only: [B] bool; true where a row may reach nothing but its set, false where it may reach anything but its set.
        allowed_before: [N+1] int32, how many leaves before each one are allowed for all rows; None allows all.
    """

    offsets: Tensor
    leaves: Tensor
    only: Tensor
    allowed_before: Tensor | None = None

    def permits(self, rows: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Whether a row may reach any of the leaves first..last-1.

        Args:
            rows: row numbers, int64 of any shape.
            first: int64 of that shape.
            last: int64 of that shape.

        Returns:
            bool of that shape.
        """
        total = last - first
        if self.allowed_before is not None:
            total = self.allowed_before[last] - self.allowed_before[first]
        if len(self.leaves) == 0:
            return (total > 0) & ~self.only[rows]
        places = torch.arange(len(self.leaves), dtype=self.offsets.dtype, device=self.offsets.device)
        row_of_place = torch.bucketize(places, self.offsets[1:], right=True)
        keys = (row_of_place << _ROW_BITS) | self.leaves
        query = rows << _ROW_BITS
        listed = torch.searchsorted(keys, query | last) - torch.searchsorted(keys, query | first)
        return torch.where(self.only[rows], listed > 0, listed < total)


def leaf_range(edges: Tensor, leaf_begins: Tensor | None) -> tuple[Tensor, Tensor]:
    """First leaf below each edge and the one behind the last, int64; without `leaf_begins` edges are leaves."""
    if leaf_begins is None:
        return edges, edges + 1
    return leaf_begins[edges].long(), leaf_begins[edges + 1].long()
