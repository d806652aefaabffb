from dataclasses import replace

import pytest
import torch

from data.schemas import NO_TARGET, ItemFilter, SeqBatch

BATCH = replace(
    SeqBatch.from_lists([[3, 1], [], [2]]), user_hashes=torch.tensor([7, 8, 9]), targets=torch.tensor([0, 1, 3])
)


def test_to_capacity_fills_up_with_empty_rows_without_target() -> None:
    filled = BATCH.to_capacity(num_rows=5, num_items=6)
    assert len(filled) == 5
    assert filled.item_ids.tolist() == [3, 1, 2, 0, 0, 0]
    assert filled.offsets.tolist() == [0, 2, 2, 3, 3, 3]
    assert filled.offsets.dtype == torch.int32
    assert filled.offsets.is_contiguous()
    assert filled.max_len == 2
    assert filled.user_hashes.tolist() == [7, 8, 9, 0, 0]
    assert filled.targets is not None
    assert filled.targets.tolist() == [0, 1, 3, NO_TARGET, NO_TARGET]


def test_to_capacity_of_a_full_batch_of_one_without_targets_and_of_none() -> None:
    full = BATCH.to_capacity(num_rows=3, num_items=3)
    assert full.item_ids.tolist() == [3, 1, 2]
    assert full.offsets.tolist() == [0, 2, 2, 3]
    assert replace(BATCH, targets=None).to_capacity(num_rows=4, num_items=3).targets is None
    nothing = SeqBatch.from_lists([]).to_capacity(num_rows=2, num_items=1)
    assert nothing.offsets.tolist() == [0, 0, 0]
    assert nothing.item_ids.tolist() == [0]


def test_to_capacity_refuses_a_batch_that_is_larger() -> None:
    with pytest.raises(ValueError, match="at most 2 rows and 3 items, got 3 rows and 3 items"):
        BATCH.to_capacity(num_rows=2, num_items=3)
    with pytest.raises(ValueError, match="at most 3 rows and 2 items, got 3 rows and 3 items"):
        BATCH.to_capacity(num_rows=3, num_items=2)


def test_unseen_items_of_jagged_rows() -> None:
    unseen = ItemFilter.unseen(SeqBatch.from_lists([[1, 1, 3], [], [0]]))
    assert unseen.flags(4).int().tolist() == [[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_filter_of_sets_and_flags() -> None:
    """Row 0 may get its set alone, row 1 anything but its set; item 3 is for nobody."""
    flags = torch.tensor([True, True, True, False])
    items = ItemFilter.from_lists([[0, 3], [0, 3], []], only=[True, False, False], allowed=flags)
    expected = [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]
    assert items.flags(4).int().tolist() == expected
    assert items.to_capacity(num_rows=4, num_items=9).flags(4).int().tolist() == [*expected, [1, 1, 1, 0]]
    assert items.part(slice(1, 3)).flags(4).int().tolist() == expected[1:]
    assert items.part(slice(1, 2)).item_ids.tolist() == [0, 3]
    assert len(items.part(slice(3, 3))) == 0
    assert ItemFilter.for_all(flags, 2).flags(4).tolist() == [flags.tolist()] * 2
    with pytest.raises(ValueError, match="at most 2 rows and 4 items, got 3 rows and 4 items"):
        items.to_capacity(num_rows=2, num_items=4)


def test_unseen_leaves_the_tail_out() -> None:
    unseen = ItemFilter.unseen(BATCH.to_capacity(num_rows=4, num_items=6)).flags(4)
    assert unseen.int().tolist() == [[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
