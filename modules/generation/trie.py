"""The prefix trie of a catalogue: which codes may follow which prefix, and which item a whole tuple is."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

import ops
from data.schemas import InputError, ItemFilter


@dataclass(frozen=True, eq=False)
class PrefixTrie:
    """All semantic ids of a catalogue, shared prefixes stored once.

    The nodes of a depth are numbered in lexicographic order of their prefixes; the root is node 0 of depth 0. Where
    items share a tuple, the last level is not one of codes: it numbers a tuple's items in the order of their ids, so
    that a leaf is always one item.

    Attributes:
        levels: for level l, the edges from the nodes of depth l to those of depth l+1.
        leaf_items: [N] int32, the item id of every node of the last depth.
        min_codes: for every level that a model writes the smallest number of codes its output head must have.
        num_item_ids: item ids of the catalogue, those of items that are not in the trie included.
        max_items_per_tuple: 1 where every item has a tuple of its own.
    """

    levels: tuple[ops.TrieLevel, ...]
    leaf_items: Tensor
    min_codes: tuple[int, ...]
    num_item_ids: int
    max_items_per_tuple: int

    @classmethod
    def from_semantic_ids(cls, semantic_ids: Tensor, available: Tensor | None = None) -> "PrefixTrie":
        """Trie of a catalogue.

        Args:
            semantic_ids: [N, L] int64, row i being the code tuple of item i; items may share one.
            available: [N] bool; items flagged false are not in the trie, the others keep their ids.

        Raises:
            InputError: if no item is available.
        """
        item_ids = None
        if available is not None:
            item_ids = available.nonzero().squeeze(1).to(semantic_ids.device)
        codes = semantic_ids if item_ids is None else semantic_ids[item_ids]
        if len(codes) == 0:
            raise InputError(
                f"PrefixTrie expected at least one available item, got none of {len(semantic_ids)}. "
                "Add items before recommending."
            )
        levels, leaf_rows = ops.build_trie(codes)
        leaf_items = leaf_rows if item_ids is None else item_ids.int()[leaf_rows]
        min_codes = tuple((codes.amax(0) + 1).tolist())
        shared = int(levels[-1].codes.max()) + 1 if len(levels) > len(min_codes) else 1
        return cls(tuple(levels), leaf_items, min_codes, len(semantic_ids), shared)

    @property
    def num_items(self) -> int:
        """Number of leaves."""
        return len(self.leaf_items)

    @property
    def num_levels(self) -> int:
        """Levels of edges; one more than a model writes where items share a tuple."""
        return len(self.levels)

    @property
    def num_code_levels(self) -> int:
        """Levels that a model writes, the length of every tuple."""
        return len(self.min_codes)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.leaf_items.device

    @cached_property
    def leaf_begins(self) -> tuple[Tensor | None, ...]:
        """For every level [E+1] int32, edge e covers the leaves [e]..[e+1]-1; or None, where edges are leaves."""
        begins: list[Tensor | None] = [None]
        for level in reversed(self.levels[1:]):
            below = begins[-1]
            begins.append(level.row_ptr if below is None else below[level.row_ptr])
        return tuple(reversed(begins))

    @cached_property
    def _leaf_of_item(self) -> Tensor:
        """[num_item_ids] int32; -1 for items that are not in the trie."""
        leaves = torch.full((self.num_item_ids,), -1, dtype=torch.int32, device=self.device)
        leaves[self.leaf_items] = torch.arange(self.num_items, dtype=torch.int32, device=self.device)
        return leaves

    def to(self, device: torch.device | str) -> "PrefixTrie":
        """The same trie on another device."""
        levels = tuple(ops.TrieLevel(level.row_ptr.to(device), level.codes.to(device)) for level in self.levels)
        return replace(self, levels=levels, leaf_items=self.leaf_items.to(device))

    def allowed_before(self, allowed: Tensor) -> Tensor:
        """[num_items + 1] int32, how many leaves before each one are flagged in `allowed` [num_item_ids] bool."""
        return pad(allowed[self.leaf_items].cumsum(0, dtype=torch.int32), (1, 0))

    def leaf_filter(self, item_filter: ItemFilter, allowed_before: Tensor | None = None) -> ops.LeafFilter:
        """An item filter as `ops.trie_topk_step` takes it: memory as the sets, and with flags one number per item.

        Repeated items count once; items that are not in the trie, or not allowed for all rows, drop out of the sets.
        A GPU's host does not wait.

        Args:
            item_filter: of B rows, on the trie's device.
            allowed_before: of `item_filter.allowed`, from the function of that name, where it is known already.

        Returns:
            the filter of B rows; its leaves [T] are as many as the item ids given, those left over behind the last row.
        """
        if allowed_before is None and item_filter.allowed is not None:
            allowed_before = self.allowed_before(item_filter.allowed)
        offsets, leaves = self._sets_of_leaves(item_filter, allowed_before)
        return ops.LeafFilter(offsets, leaves, item_filter.only, allowed_before)

    def _sets_of_leaves(self, item_filter: ItemFilter, allowed_before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Offsets [B+1] and ascending, distinct leaves [T] of the rows' sets."""
        num_rows, size = len(item_filter), len(item_filter.item_ids)
        if size == 0:
            return torch.zeros_like(item_filter.offsets), item_filter.item_ids.int()
        places = torch.arange(size, dtype=item_filter.offsets.dtype, device=self.device)
        rows = torch.bucketize(places, item_filter.offsets[1:], right=True)
        leaves = self._leaf_of_item[item_filter.item_ids]
        counts = leaves >= 0
        if allowed_before is not None:
            counts &= allowed_before[leaves + 1] > allowed_before[leaves.clamp(min=0)]
        # Sorted by (row, leaf), what drops out or is no row's at the end; twice: repeated leaves are known once sorted.
        behind_all = num_rows * self.num_items
        keys = torch.where(counts, rows * self.num_items + leaves, behind_all).sort().values
        is_repeated = pad(keys[1:] == keys[:-1], (1, 0))
        keys = keys.masked_fill(is_repeated, behind_all).sort().values
        bounds = torch.arange(num_rows + 1, device=self.device) * self.num_items
        return torch.searchsorted(keys, bounds, out_int32=True), (keys % self.num_items).int()
