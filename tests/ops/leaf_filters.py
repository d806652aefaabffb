"""Leaf filters from sets, random ones, and what they mean in Python's sets."""

import torch

from ops import LeafFilter


def leaf_filter_of(sets, only, allowed=None, tail=0):
    """From one set of leaves per row, flags per row and flags [N] for all rows; leaves not allowed are left out.

    `tail` leaves behind the last row belong to no row.
    """
    if allowed is not None:
        sets = [{leaf for leaf in row if allowed[leaf]} for row in sets]
    offsets = torch.tensor([0, *(len(row) for row in sets)]).cumsum(0).int()
    leaves = torch.tensor([leaf for row in sets for leaf in sorted(row)] + [3, 1, 2][:tail], dtype=torch.int32)
    before = None if allowed is None else torch.tensor([0, *allowed]).cumsum(0).int()
    return LeafFilter(offsets, leaves, torch.tensor(only, dtype=torch.bool), before)


def random_leaf_filter(num_rows, num_leaves, *, share=0.5, flags=True, tail=2, seed=0):
    """Sets of a share of all leaves; rows take turns in what their sets mean."""
    generator = torch.Generator().manual_seed(seed)
    listed = torch.rand(num_rows, num_leaves, generator=generator) < share
    sets = [set(row.nonzero().flatten().tolist()) for row in listed]
    allowed = (torch.rand(num_leaves, generator=generator) < 0.7).tolist() if flags else None
    return leaf_filter_of(sets, [row % 2 == 1 for row in range(num_rows)], allowed, tail)


def random_leaf_begins(num_edges, seed=0):
    """[E+1] int32; one to four leaves below every edge."""
    sizes = torch.randint(1, 5, (num_edges,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()


def reachable(leaf_filter, row, num_leaves):
    """The set of leaves that a row may reach."""
    begin, end = leaf_filter.offsets[row : row + 2].tolist()
    listed = set(leaf_filter.leaves[begin:end].tolist())
    if bool(leaf_filter.only[row]):
        return listed
    before = leaf_filter.allowed_before
    every = range(num_leaves) if before is None else before.diff().nonzero().flatten().tolist()
    return set(every) - listed


def moved(leaf_filter, device):
    """The filter on another device."""
    return LeafFilter(*(None if part is None else part.to(device) for part in leaf_filter))
