import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError
from modules.tokenizer.collisions import (
    check_codes,
    check_dedup_capacity,
    dedup_capacity,
    dedup_codes,
    joining_dedup_codes,
)

CODES = torch.tensor([[1, 2], [0, 5], [1, 2], [1, 3], [1, 2], [0, 5]])


def test_dedup_codes_count_by_item_id():
    assert dedup_codes(CODES).tolist() == [0, 0, 1, 0, 2, 1]


def test_added_items_leave_earlier_codes_alone():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (500, 3), generator=generator)
    whole = dedup_codes(codes)
    for count in (1, 63, 499):
        assert torch.equal(dedup_codes(codes[:count]), whole[:count])


def test_every_item_of_a_large_catalogue_gets_an_id_of_its_own():
    codes = torch.randint(30, (200_000, 3), generator=torch.Generator().manual_seed(0))
    dedup = dedup_codes(codes)
    tuples = torch.cat([codes, dedup[:, None]], dim=1)
    keys = (tuples * torch.tensor([30 * 30 * 1000, 30 * 1000, 1000, 1])).sum(dim=1)
    assert len(keys.unique()) == 200_000
    # Within a group the codes are 0, 1, 2, ... without a gap.
    _, groups, sizes = (keys // 1000).unique(return_inverse=True, return_counts=True)
    assert torch.equal(torch.zeros_like(sizes).scatter_reduce(0, groups, dedup, "amax"), sizes - 1)


@pytest.mark.parametrize(("largest", "capacity"), [(1, 4), (2, 4), (3, 8), (4, 8), (5, 16), (8, 16), (9, 32)])
def test_capacity_is_a_power_of_two_with_room_for_as_many_again(largest, capacity):
    assert dedup_capacity(largest) == capacity


def test_overflow_names_the_item_and_the_remedy():
    dedup = torch.tensor([0, 1, 2, 3, 4])
    check_dedup_capacity(dedup[:4], 4)
    with pytest.raises(InputError, match="item_id 4 would be number 5 of its tuple") as error:
        check_dedup_capacity(dedup, 4)
    assert "Fit a new tokenizer" in str(error.value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0, 4]]), "level 1 expected codes in 0..3, got 4..4"),
        (torch.tensor([[-1, 0]]), "level 0"),
        (torch.tensor([[0, 0, 0]]), r"\[N >= 1, 2\]"),
        (torch.zeros(0, 2, dtype=torch.int64), r"\[N >= 1, 2\]"),
    ],
)
def test_codes_outside_their_level_are_refused(codes, message):
    with pytest.raises(InputError, match=message):
        check_codes(codes, (4, 4))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 5, 70_000]), min_size=1, max_size=4),
    num_items=st.integers(1, 60),
    num_joining=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_joining_items_get_the_codes_that_a_count_of_all_gives(sizes, num_items, num_joining, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = num_items + num_joining
    codes = torch.stack([torch.randint(size, (rows,), generator=generator) for size in sizes], dim=1)
    whole = dedup_codes(codes)
    catalogue = torch.cat([codes, whole[:, None]], dim=1)[:num_items]
    assert torch.equal(joining_dedup_codes(catalogue, codes[num_items:], sizes), whole[num_items:])


def test_joining_items_follow_the_largest_dedup_code():
    """Also where earlier dedup codes have gaps."""
    catalogue = torch.tensor([[1, 2, 5], [0, 0, 0], [1, 2, 1]])
    joining = torch.tensor([[1, 2], [1, 3], [0, 0], [1, 2]])
    assert joining_dedup_codes(catalogue, joining, (2, 4)).tolist() == [6, 0, 1, 7]
