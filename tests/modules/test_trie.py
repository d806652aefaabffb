import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError, ItemFilter
from modules.generation.trie import PrefixTrie
from tests.ops.leaf_filters import reachable

SEMANTIC_IDS = torch.tensor([[1, 5], [0, 2], [1, 3], [0, 0], [2, 2]])
"""In lexicographic order: items 3, 1, 2, 0, 4."""

SHARED = torch.tensor([[1, 0], [0, 2], [1, 0], [0, 0], [1, 0]])
"""Items 0, 2 and 4 share a tuple; in lexicographic order: items 3, 1, 0, 2, 4."""


def listed(leaf_filter, row):
    return leaf_filter.leaves[leaf_filter.offsets[row] : leaf_filter.offsets[row + 1]].tolist()


def test_leaves_carry_item_ids():
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS)
    assert trie.leaf_items.tolist() == [3, 1, 2, 0, 4]
    assert (trie.num_items, trie.num_levels, trie.num_code_levels, trie.min_codes) == (5, 2, 2, (3, 6))
    assert (trie.num_item_ids, trie.max_items_per_tuple) == (5, 1)


def test_items_that_share_a_tuple():
    trie = PrefixTrie.from_semantic_ids(SHARED)
    assert trie.leaf_items.tolist() == [3, 1, 0, 2, 4]
    assert (trie.num_items, trie.num_levels, trie.num_code_levels, trie.min_codes) == (5, 3, 2, (2, 3))
    assert trie.max_items_per_tuple == 3


def test_items_that_are_not_available_keep_their_ids():
    available = torch.tensor([True, False, True, False, True])
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS, available)
    assert trie.leaf_items.tolist() == [2, 0, 4]
    assert (trie.num_items, trie.num_item_ids, trie.min_codes) == (3, 5, (3, 6))
    leaf_filter = trie.leaf_filter(ItemFilter.from_lists([[3, 4, 1, 0]]))
    assert listed(leaf_filter, 0) == [1, 2]


def test_no_available_item_is_an_error():
    with pytest.raises(InputError, match="at least one available item, got none of 5"):
        PrefixTrie.from_semantic_ids(SEMANTIC_IDS, torch.zeros(5, dtype=torch.bool))


def test_leaf_begins_by_hand():
    first, last = PrefixTrie.from_semantic_ids(SEMANTIC_IDS).leaf_begins
    assert first.tolist() == [0, 2, 4, 5]
    assert last is None


def test_leaf_begins_alias_the_last_level():
    trie = PrefixTrie.from_semantic_ids(SHARED)
    first, second, last = trie.leaf_begins
    assert first.tolist() == [0, 2, 5]
    assert second is trie.levels[2].row_ptr
    assert last is None
    assert first.dtype == torch.int32


def test_a_filter_by_hand():
    """Repeated ids count once; item 1 is for nobody; what lies behind the last row is nobody's."""
    flags = torch.tensor([True, False, True, True, True])
    items = ItemFilter.from_lists([[4, 0, 4, 1], [], [2]], [False, True, True], flags)
    leaf_filter = PrefixTrie.from_semantic_ids(SEMANTIC_IDS).leaf_filter(items.to_capacity(num_rows=4, num_items=9))
    assert [listed(leaf_filter, row) for row in range(4)] == [[3, 4], [], [2], []]
    assert leaf_filter.only.tolist() == [False, True, True, False]
    assert leaf_filter.allowed_before.tolist() == [0, 1, 1, 2, 3, 4]
    assert [part.dtype for part in leaf_filter] == [torch.int32, torch.int32, torch.bool, torch.int32]
    assert [sorted(reachable(leaf_filter, row, 5)) for row in range(4)] == [[0, 2], [], [2], [0, 2, 3, 4]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(st.integers(0, 29), max_size=40), st.booleans()), min_size=1, max_size=4),
    shared=st.booleans(),
    flags=st.booleans(),
    tail=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_filters_reach_the_leaves_of_permitted_items(rows, shared, flags, tail, seed):
    generator = torch.Generator().manual_seed(seed)
    semantic_ids = torch.randint(0, 3 if shared else 50, (30, 3), generator=generator)
    available = torch.rand(30, generator=generator) < 0.8
    trie = PrefixTrie.from_semantic_ids(semantic_ids, available)
    allowed = torch.rand(30, generator=generator) < 0.7 if flags else None
    items = ItemFilter.from_lists([row[0] for row in rows], [row[1] for row in rows], allowed)
    leaf_filter = trie.leaf_filter(items.to_capacity(num_rows=len(rows), num_items=len(items.item_ids) + tail))
    expected = items.flags(30) & available
    for row, row_flags in enumerate(expected):
        leaves = listed(leaf_filter, row)
        assert leaves == sorted(set(leaves))
        items_reached = trie.leaf_items[sorted(reachable(leaf_filter, row, trie.num_items))]
        assert sorted(items_reached.tolist()) == row_flags.nonzero().flatten().tolist()
    known = None if allowed is None else trie.allowed_before(allowed)
    for part, other in zip(trie.leaf_filter(items, known), trie.leaf_filter(items), strict=True):
        assert part is None or torch.equal(part, other)


def test_one_item():
    trie = PrefixTrie.from_semantic_ids(torch.tensor([[7, 0, 3]]))
    assert trie.min_codes == (8, 1, 4)
    assert [None if begins is None else begins.tolist() for begins in trie.leaf_begins] == [[0, 1], [0, 1], None]


def test_moving_to_a_device_keeps_everything():
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS)
    moved = trie.to("meta")
    assert moved.device.type == "meta"
    assert moved.levels[1].codes.device.type == "meta"
    assert moved.min_codes == trie.min_codes
    assert moved.num_item_ids == 5
