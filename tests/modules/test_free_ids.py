import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError
from modules.tokenizer.free_ids import FreeIds


def table(*rows):
    return np.array(rows, dtype=np.int64)


def never(level, prefix):
    pytest.fail(f"no costs are needed, but those of level {level} behind {prefix} were asked for")


class Costs:
    """Given costs per level, whatever the prefix; remembers what was asked."""

    def __init__(self, *levels):
        self.levels = [np.array(level, dtype=np.float32) for level in levels]
        self.asked = []

    def __call__(self, level, prefix):
        self.asked.append((level, list(prefix)))
        return self.levels[level]


def test_a_free_id_is_kept_without_asking_for_costs():
    free = FreeIds(table([0, 1], [1, 0]), (2, 3))
    assert free.take([0, 0], never) == [0, 0]
    assert free.take([1, 2], never) == [1, 2]


def test_the_last_level_gives_way_first_then_the_one_before_it_and_then_nothing_is_left():
    free = FreeIds(table([0, 1]), (2, 3))
    costs = Costs([0.1, 0.2], [3.0, 1.0, 2.0])
    assert [free.take([0, 1], costs) for _ in range(5)] == [[0, 2], [0, 0], [1, 1], [1, 2], [1, 0]]
    assert costs.asked == [(1, [0]), (1, [0]), (0, []), (1, [1]), (0, []), (1, [1]), (0, []), (1, [1])]
    with pytest.raises(InputError, match=r"all 6 ids of codebooks of \(2, 3\) codes are taken"):
        free.take([1, 1], costs)


def test_the_nearest_prefix_with_room_is_taken_and_full_ones_are_passed_over():
    taken = table([0, 0, 0], [0, 0, 1], [0, 2, 0], [0, 2, 1])
    free = FreeIds(taken, (2, 3, 2))
    costs = Costs([0.0, 1.0], [0.0, 2.0, 1.0], [5.0, 4.0])  # behind [0] code 2 is nearer than 1, but full
    assert free.take([0, 0, 0], costs) == [0, 1, 1]


def test_equal_costs_go_to_the_lowest_code_and_nan_counts_as_most():
    free = FreeIds(table([0]), (5,))
    costs = Costs([0.0, np.nan, 2.0, 1.0, 1.0])
    assert [free.take([0], costs)[0] for _ in range(4)] == [3, 4, 2, 1]


def test_infinite_costs_are_not_taken_for_full():
    free = FreeIds(table([0]), (3,))
    assert sorted(free.take([0], Costs([np.inf] * 3))[0] for _ in range(2)) == [1, 2]


def test_more_levels_and_codes_than_64_bits_can_number():
    free = FreeIds(np.zeros((1, 8), dtype=np.int64), (1 << 17,) * 8)
    assert free.take([0] * 8, Costs(*[np.arange(1 << 17)] * 8)) == [0, 0, 0, 0, 0, 0, 0, 1]
    assert free.take([70_000] * 8, never) == [70_000] * 8


def by_definition(taken, sizes, costs):
    """The first free one of all tuples, sorted by the rank of their codes level by level."""
    ranks = [np.argsort(np.argsort(level, kind="stable"), kind="stable") for level in costs]
    tuples = set(itertools.product(*map(range, sizes))) - taken
    return min(tuples, key=lambda codes: [rank[code] for rank, code in zip(ranks, codes, strict=True)])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_equals_the_first_free_tuple_in_the_order_of_ranks(sizes, seed, share):
    rng = np.random.default_rng(seed)
    every = list(itertools.product(*map(range, sizes)))
    taken = {codes for codes in every if rng.random() < share}
    free = FreeIds(np.array(sorted(taken), dtype=np.int64).reshape(-1, len(sizes)), sizes)
    while len(taken) < len(every):
        costs = Costs(*[rng.permutation(size) for size in sizes])
        nearest = [int(level.argmin()) for level in costs.levels]
        expected = by_definition(taken, sizes, costs.levels)
        assert tuple(free.take(nearest, costs)) == expected
        taken.add(expected)
    with pytest.raises(InputError, match="are taken"):
        free.take([0] * len(sizes), never)
