import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError
from modules.tokenizer.nearest_free import joined, separated


def costs_of(*levels):
    """Costs [N, K_l] per level, whatever the codes before; items are those that were announced."""

    def of(announced):
        def costs(item_ids, codes, level):
            assert set(item_ids.tolist()) <= set(announced.tolist())
            assert codes.shape[0] == len(item_ids)
            return levels[level][item_ids]

        return costs

    return of


def test_the_item_of_least_cost_keeps_its_codes_and_the_others_follow_in_order_of_cost():
    codes = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1], [0, 1], [0, 2]])
    last = torch.tensor(
        [
            [9.0, 0.4, 9.5, 0.9],
            [1.0, 0.3, 9.5, 2.0],
            [0.0, 9.0, 9.0, 9.0],
            [1.0, 0.1, 9.5, 2.0],
            [1.0, 0.3, 9.5, 2.0],  # as near as item 1, whose id is smaller
            [9.0, 9.0, 0.0, 9.0],
        ]
    )
    first = torch.tensor([[0.0, 1.0]] * 6)
    # Item 3 keeps (0, 1); 1 takes 0, 4 takes 3, and 0 finds all of (0, *) taken: it leaves for (1, 1).
    ids = separated(codes, (2, 4), costs_of(first, last))
    assert ids.tolist() == [[1, 1], [0, 0], [1, 0], [0, 1], [0, 3], [0, 2]]
    assert codes[0].tolist() == [0, 1]  # what was given is not changed


def test_groups_move_in_lexicographic_order_and_never_onto_a_tuple_that_an_item_has():
    codes = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0], [0, 1]])
    first = torch.tensor([[0.0, 1.0]] * 5)
    last = torch.tensor([[0.0, 1.0, 2.0]] * 5)
    assert separated(codes, (2, 3), costs_of(first, last)).tolist() == [[1, 0], [1, 1], [0, 0], [0, 2], [0, 1]]
    # With two codes at the last level (0, *) is full, and the item of the first group comes before that of (1, 0).
    full = separated(codes[:4], (2, 2), costs_of(first, last[:, :2]))
    assert full.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    with pytest.raises(InputError, match=r"all 4 ids of codebooks of \(2, 2\) codes are taken"):
        separated(codes, (2, 2), costs_of(first, last[:, :2]))


def test_distinct_codes_stay_without_a_look_at_costs():
    codes = torch.tensor([[1, 0], [0, 0], [0, 1]])
    assert torch.equal(separated(codes, (2, 2), lambda _: pytest.fail("costs")), codes)
    assert joined(codes, torch.tensor([[1, 1]]), (2, 2), lambda _: pytest.fail("costs")).tolist() == [[1, 1]]
    assert joined(codes, codes[:0], (2, 2), lambda _: pytest.fail("costs")).shape == (0, 2)


def random_costs(num_items, sizes, generator):
    return costs_of(*[torch.rand(num_items, size, generator=generator) for size in sizes])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_as_few_items_move_as_can_be_and_all_ids_differ(sizes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    num_items = max(1, int(share * torch.tensor(sizes).prod()))
    codes = torch.stack([torch.randint(size, (num_items,), generator=generator) for size in sizes], dim=1)
    ids = separated(codes, sizes, random_costs(num_items, sizes, generator))
    num_distinct = len(codes.unique(dim=0))
    assert len(ids.unique(dim=0)) == num_items
    assert int((ids != codes).any(dim=1).sum()) == num_items - num_distinct
    assert bool((ids < torch.tensor(sizes)).all())
    assert bool((ids >= 0).all())


@settings(max_examples=40, deadline=None)
@given(num_items=st.integers(1, 12), num_joining=st.integers(1, 12), seed=st.integers(0, 1000), cut=st.integers(0, 12))
def test_items_that_join_take_free_ids_one_by_one(num_items, num_joining, seed, cut):
    generator, sizes = torch.Generator().manual_seed(seed), (3, 2, 4)
    every = torch.cartesian_prod(*map(torch.arange, sizes))
    catalogue = every[torch.randperm(len(every), generator=generator)[:num_items]]
    codes = torch.stack([torch.randint(2, (num_joining,), generator=generator) for _ in sizes], dim=1)
    levels = [torch.rand(num_joining, size, generator=generator) for size in sizes]
    ids = joined(catalogue, codes, sizes, costs_of(*levels))
    assert len(torch.cat([catalogue, ids]).unique(dim=0)) == num_items + num_joining
    cut = min(cut, num_joining)
    begun = joined(catalogue, codes[:cut], sizes, costs_of(*[level[:cut] for level in levels]))
    ended = joined(torch.cat([catalogue, begun]), codes[cut:], sizes, costs_of(*[level[cut:] for level in levels]))
    assert torch.equal(torch.cat([begun, ended]), ids)


def test_blocks_do_not_matter(monkeypatch):
    generator, sizes = torch.Generator().manual_seed(0), (4, 4, 8)
    codes = torch.randint(4, (100, 3), generator=generator)
    costs = random_costs(100, sizes, generator)
    whole = separated(codes, sizes, costs)
    monkeypatch.setattr("modules.tokenizer.nearest_free._BLOCK", 7)
    assert torch.equal(separated(codes, sizes, costs), whole)
