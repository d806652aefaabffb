from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops.reference import build_trie as module


def walk(levels, depth=0, node=0):
    """Every code tuple below a node, in node order."""
    if depth == len(levels):
        return [()]
    row_ptr, codes = levels[depth]
    return [
        (int(codes[edge]), *rest)
        for edge in range(int(row_ptr[node]), int(row_ptr[node + 1]))
        for rest in walk(levels, depth + 1, edge)
    ]


def test_literal_trie():
    codes = torch.tensor([[1, 5], [0, 2], [1, 3], [0, 0]])
    levels, leaf_rows = ops.build_trie(codes)
    assert levels[0].row_ptr.tolist() == [0, 2]
    assert levels[0].codes.tolist() == [0, 1]
    assert levels[1].row_ptr.tolist() == [0, 2, 4]
    assert levels[1].codes.tolist() == [0, 2, 3, 5]
    assert leaf_rows.tolist() == [3, 1, 2, 0]
    assert all(level.row_ptr.dtype == torch.int32 and level.codes.dtype == torch.int16 for level in levels)
    assert leaf_rows.dtype == torch.int32


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    level_sizes=st.lists(st.sampled_from([1, 2, 7, 300, 1 << 15, 1 << 16, 1 << 31]), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    fits_a_key=st.booleans(),
)
def test_walking_gives_back_the_rows_in_lexicographic_order(num_rows, level_sizes, seed, fits_a_key):
    """Equal rows in their own order; one sort where the codes fit one number, else a sort per column."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, size, (num_rows,), generator=generator) for size in level_sizes], dim=1)
    with mock.patch.object(module, "_KEY_BITS", 63 if fits_a_key else -1):
        levels, leaf_rows = ops.build_trie(codes)
    rows = codes.tolist()
    expected = sorted(range(num_rows), key=lambda row: (rows[row], row))
    assert leaf_rows.tolist() == expected
    walked = walk(levels)
    assert [list(leaf[: len(level_sizes)]) for leaf in walked] == [rows[row] for row in expected]
    repeated = len({tuple(row) for row in rows}) < num_rows
    assert len(levels) == len(level_sizes) + repeated
    if repeated:
        numbers = [sum(rows[other] == rows[row] for other in range(row)) for row in expected]
        assert [leaf[-1] for leaf in walked] == numbers
    for level, size in zip(levels, level_sizes, strict=False):
        assert level.row_ptr.dtype == torch.int32
        assert level.codes.dtype == (torch.int16 if int(level.codes.max()) < 1 << 15 else torch.int32)
        assert int(level.codes.max()) < size


def test_levels_of_very_different_sizes():
    codes = torch.tensor([[0, 900_000, 0], [0, 4, 1], [0, 4, 0]])
    levels, leaf_rows = ops.build_trie(codes)
    assert walk(levels) == [(0, 4, 0), (0, 4, 1), (0, 900_000, 0)]
    assert leaf_rows.tolist() == [2, 1, 0]
    assert [level.codes.dtype for level in levels] == [torch.int16, torch.int32, torch.int16]


def test_equal_tuples_get_a_level_of_their_own():
    levels, leaf_rows = ops.build_trie(torch.tensor([[0, 1], [2, 3], [0, 1], [0, 0], [0, 1]]))
    assert walk(levels) == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 1, 2), (2, 3, 0)]
    assert leaf_rows.tolist() == [3, 0, 2, 4, 1]


def test_codes_are_as_narrow_as_they_can_be():
    for highest, dtype in ((32767, torch.int16), (32768, torch.int32)):
        levels, _ = ops.build_trie(torch.tensor([[highest], [3]]))
        assert levels[0].codes.tolist() == [3, highest]
        assert levels[0].codes.dtype == dtype


def test_non_contiguous_codes():
    codes = torch.tensor([[1, 0, 1, 0], [5, 2, 3, 0]]).T
    levels, _ = ops.build_trie(codes)
    assert walk(levels) == [(0, 0), (0, 2), (1, 3), (1, 5)]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[N, L\]"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one"),
        (torch.zeros(2, 0, dtype=torch.int64), "at least one"),
        (torch.zeros(2, 2), "int64"),
        (torch.tensor([[0, -1]]), "negative -1"),
        (torch.tensor([[0, 1 << 31]]), "got 2147483648"),
    ],
)
def test_bad_codes_are_named(codes, message):
    with pytest.raises(ValueError, match=message):
        ops.build_trie(codes)
