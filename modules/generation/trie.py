"""The prefix trie of a catalogue: which codes may follow which prefix, and which item a whole tuple is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import ops


@dataclass(frozen=True, eq=False)
class PrefixTrie:
    """All semantic ids of a catalogue, shared prefixes stored once.

    The nodes of a depth are numbered in lexicographic order of their prefixes; the root is node 0 of depth 0.

    Attributes:
        levels: for level l, the edges from the nodes of depth l to those of depth l+1.
        leaf_items: [N] int64, the item id of every node of the last depth.
        min_codes: for every level the smallest number of codes a model's output head must have.
    """

    levels: tuple[ops.TrieLevel, ...]
    leaf_items: Tensor
    min_codes: tuple[int, ...]

    @classmethod
    def from_semantic_ids(cls, semantic_ids: Tensor) -> "PrefixTrie":
        """Trie of a catalogue.

        Args:
            semantic_ids: [N, L] int64, row i being the code tuple of item i.

        Raises:
            InputError: if two items have the same tuple.
        """
        levels, leaf_items = ops.build_trie(semantic_ids)
        min_codes = tuple((semantic_ids.amax(0) + 1).tolist())
        return cls(tuple(levels), leaf_items, min_codes)

    @property
    def num_items(self) -> int:
        """Number of leaves."""
        return len(self.leaf_items)

    @property
    def num_levels(self) -> int:
        """Length of every tuple."""
        return len(self.levels)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.leaf_items.device

    def to(self, device: torch.device | str) -> "PrefixTrie":
        """The same trie on another device."""
        levels = tuple(ops.TrieLevel(level.row_ptr.to(device), level.codes.to(device)) for level in self.levels)
        return replace(self, levels=levels, leaf_items=self.leaf_items.to(device))

    def allowed_nodes(self, allowed: Tensor) -> list[Tensor]:
        """Which nodes lie on a path to an allowed item.

        Args:
            allowed: [N] or [B, N] bool over item ids.

        Returns:
            for every level the flags of the nodes its edges arrive at, [E] or [B, E] bool.
        """
        flags = [allowed[..., self.leaf_items]]
        for level in reversed(self.levels[1:]):
            flags.append(_any_child(flags[-1], level.row_ptr))
        return flags[::-1]


def _any_child(child_flags: Tensor, row_ptr: Tensor) -> Tensor:
    """For every node, whether one of its children (a run of `child_flags`' last axis) is flagged."""
    parents = torch.repeat_interleave(row_ptr.diff(), output_size=child_flags.shape[-1])
    num_flagged = child_flags.new_zeros((*child_flags.shape[:-1], len(row_ptr) - 1), dtype=torch.int32)
    return num_flagged.index_add_(-1, parents, child_flags.int()) > 0
