import pytest
import torch

import ops
from data.schemas import InputError


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
    assert all(level.row_ptr.dtype == level.codes.dtype == torch.int32 for level in levels)
    assert leaf_rows.dtype == torch.int64


@pytest.mark.parametrize(("num_rows", "num_levels", "num_codes"), [(1, 1, 1), (1, 4, 9), (63, 2, 11), (500, 4, 7)])
def test_walking_gives_back_the_tuples_in_lexicographic_order(num_rows, num_levels, num_codes):
    generator = torch.Generator().manual_seed(num_rows)
    codes = torch.randint(0, num_codes, (num_rows * 2, num_levels), generator=generator).unique(dim=0)
    codes = codes[torch.randperm(len(codes), generator=generator)][:num_rows]
    levels, leaf_rows = ops.build_trie(codes)
    expected = sorted(tuple(row) for row in codes.tolist())
    assert walk(levels) == expected
    assert [tuple(row) for row in codes[leaf_rows].tolist()] == expected


def test_levels_of_very_different_sizes():
    codes = torch.tensor([[0, 900_000, 0], [0, 4, 1], [0, 4, 0]])
    levels, leaf_rows = ops.build_trie(codes)
    assert walk(levels) == [(0, 4, 0), (0, 4, 1), (0, 900_000, 0)]
    assert leaf_rows.tolist() == [2, 1, 0]


def test_equal_tuples_are_refused():
    codes = torch.tensor([[0, 1], [2, 3], [0, 1]])
    with pytest.raises(InputError, match=r"1 repeats; rows 0 and 2 are both \(0, 1\).*dedup"):
        ops.build_trie(codes)


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
        (torch.tensor([[0, -1]]), "negative"),
    ],
)
def test_bad_codes_are_named(codes, message):
    with pytest.raises(ValueError, match=message):
        ops.build_trie(codes)
