import pytest
import torch

from data.schemas import InputError
from modules.generation.trie import PrefixTrie

SEMANTIC_IDS = torch.tensor([[1, 5], [0, 2], [1, 3], [0, 0], [2, 2]])
"""In lexicographic order: items 3, 1, 2, 0, 4."""


def test_leaves_carry_item_ids():
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS)
    assert trie.leaf_items.tolist() == [3, 1, 2, 0, 4]
    assert (trie.num_items, trie.num_levels, trie.min_codes) == (5, 2, (3, 6))


def test_allowed_nodes_by_hand():
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS)
    allowed = torch.zeros(5, dtype=torch.bool)
    allowed[[0, 4]] = True
    first, second = trie.allowed_nodes(allowed)
    assert first.tolist() == [False, True, True]
    assert second.tolist() == [False, False, False, True, True]


def test_allowed_nodes_per_row():
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS)
    allowed = torch.zeros(3, 5, dtype=torch.bool)
    allowed[1, 1] = True
    allowed[2] = True
    first, second = trie.allowed_nodes(allowed)
    assert first.tolist() == [[False] * 3, [True, False, False], [True] * 3]
    assert second.tolist() == [[False] * 5, [False, True, False, False, False], [True] * 5]


def test_one_item():
    trie = PrefixTrie.from_semantic_ids(torch.tensor([[7, 0, 3]]))
    assert trie.min_codes == (8, 1, 4)
    assert [flags.tolist() for flags in trie.allowed_nodes(torch.tensor([True]))] == [[True]] * 3


def test_duplicates_are_refused():
    with pytest.raises(InputError, match="rows 1 and 2 are both"):
        PrefixTrie.from_semantic_ids(torch.tensor([[0, 0], [4, 4], [4, 4]]))


def test_moving_to_a_device_keeps_everything():
    trie = PrefixTrie.from_semantic_ids(SEMANTIC_IDS)
    moved = trie.to("meta")
    assert moved.device.type == "meta"
    assert moved.levels[1].codes.device.type == "meta"
    assert moved.min_codes == trie.min_codes
