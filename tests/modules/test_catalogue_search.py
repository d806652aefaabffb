from math import fsum
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modules.catalogue_search as search_module
from data.schemas import InputError, ItemFilter
from evaluation.ranker import check_ranking
from modules.catalogue_search import rank_items, score_items, search_catalogue


def exact_scores(queries, vectors):
    """Sums without rounding until the last step, by Python."""
    rows = [
        [fsum(x * y for x, y in zip(query, vector, strict=True)) for vector in vectors.tolist()]
        for query in queries.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64).view(len(queries), len(vectors)).float()


def brute_force(queries, vectors, k, allowed=None, available=None):
    """One item after the other, in Python's order of (-score, item id)."""
    num_items = len(vectors)
    flags = torch.ones(len(queries), num_items, dtype=torch.bool) if allowed is None else allowed.flags(num_items)
    flags = flags if available is None else flags & available
    lists = []
    for scores, permitted in zip(exact_scores(queries, vectors).tolist(), flags.tolist(), strict=True):
        found = sorted((-score, item) for item, score in enumerate(scores) if permitted[item])[:k]
        lists.append(found + [(torch.inf, -1)] * (k - len(found)))
    ids = torch.tensor([[item for _, item in row] for row in lists], dtype=torch.int64).view(len(queries), k)
    return ids, torch.tensor([[-score for score, _ in row] for row in lists]).view(len(queries), k)


def assert_equal_lists(got, expected):
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def blocks_of(items=1 << 15, cells=1 << 21, pairs=1 << 13, spare=12):
    """Searches in other portions."""
    return mock.patch.multiple(
        search_module,
        _BLOCK_ITEMS=items,
        _BLOCK_CELLS={"cpu": cells},
        _BLOCK_PAIRS={"cpu": pairs},
        _SPARE_CANDIDATES=spare,
    )


@st.composite
def searches(draw):
    """Random parts, with repeated vectors, integers (whose scores often tie) and queries of zeros."""
    num_rows, num_items, width = draw(st.integers(0, 4)), draw(st.integers(0, 60)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    vectors, queries = (torch.randn(size, width, generator=generator) for size in (num_items, num_rows))
    if draw(st.booleans()):
        vectors, queries = vectors.round(), queries.round()
    if draw(st.booleans()) and num_items:
        vectors = vectors[torch.randint(num_items, (num_items,), generator=generator) // 4]
    queries[::3] *= draw(st.sampled_from([0.0, 1.0]))
    flags = [torch.rand(num_items, generator=generator) < 0.7 for _ in range(2)]
    sets = [torch.randint(max(num_items, 1), (size,), generator=generator).tolist() for size in (0, 5, 90, 3)]
    sets = sets[:num_rows] if num_items else [[]] * num_rows
    only = draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
    allowed = ItemFilter.from_lists(sets, only, draw(st.sampled_from([None, flags[0]])))
    return queries, vectors, draw(st.sampled_from([None, allowed])), draw(st.sampled_from([None, flags[1]]))


@settings(max_examples=60, deadline=None)
@given(
    parts=searches(),
    k=st.integers(0, 70),
    items=st.integers(1, 40),
    cells=st.integers(1, 300),
    pairs=st.integers(1, 99),
    spare=st.integers(0, 5),
)
def test_lists_are_those_of_brute_force_in_blocks_of_any_size(parts, k, items, cells, pairs, spare):
    queries, vectors, allowed, available = parts
    expected = brute_force(queries, vectors, k, allowed, available)
    with blocks_of(items, cells, pairs, spare):
        got = search_catalogue(queries, vectors, k, allowed, available, ranker="dense")
    assert_equal_lists(got, expected)
    check_ranking("dense", *got, num_rows=len(queries), k=k, num_items=len(vectors))


def near_ties(num_items=2000, num_queries=3, width=48):
    """Items whose scores differ by less than a product in fp32 is off, each vector three times."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, width, generator=generator) + 1e-7 * torch.randn(num_items, width, generator=generator)
    order = torch.randperm(3 * num_items, generator=generator)
    return torch.randn(num_queries, width, generator=generator), vectors.repeat(3, 1)[order]


@pytest.mark.parametrize(("items", "cells"), [(1 << 15, 1 << 21), (1000, 4096), (997, 1000), (64, 64)])
def test_lists_do_not_depend_on_blocks_where_products_are_nearly_equal(items, cells):
    queries, vectors = near_ties()
    scores = (queries.double() @ vectors.double().T).float()
    assert ((queries @ vectors.T) != scores).any()  # products alone would order them otherwise
    with blocks_of(items, cells):
        item_ids, found = search_catalogue(queries, vectors, 30, ranker="dense")
    torch.testing.assert_close(found, scores.sort(descending=True).values[:, :30], rtol=0, atol=0)
    for row in range(3):
        expected = sorted(range(len(vectors)), key=lambda item, row=row: (-scores[row, item].item(), item))
        assert item_ids[row].tolist() == expected[:30]
    alone = [search_catalogue(queries[row : row + 1], vectors, 30, ranker="dense") for row in range(3)]
    assert_equal_lists((item_ids, found), [torch.cat(column) for column in zip(*alone, strict=True)])


def test_few_rows_are_searched_twice():
    generator = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(size, 32, generator=generator) for size in (5000, 200))
    with mock.patch.object(search_module._Search, "_thorough", side_effect=AssertionError("searched again")):
        search_catalogue(queries, vectors, 20, ranker="dense")
        with pytest.raises(AssertionError, match="searched again"):
            search_catalogue(queries, vectors[:100].repeat(50, 1), 20, ranker="dense")


def test_zero_queries_list_the_lowest_permitted_ids_without_scoring_all():
    vectors = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    allowed = ItemFilter.from_lists([[0, 2], [7, 250, 9, 30]], [False, True])
    with blocks_of(items=20), mock.patch.object(search_module, "score_items", wraps=score_items) as scored:
        item_ids, scores = search_catalogue(torch.zeros(2, 4), vectors, 3, allowed, ranker="dense")
    assert item_ids.tolist() == [[1, 3, 4], [7, 9, 30]]
    assert scores.eq(0).all()
    assert max(call.args[2].shape[1] for call in scored.call_args_list) < 30


def test_half_precision_is_scored_exactly():
    generator = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(size, 16, generator=generator).bfloat16() for size in (200, 3))
    got = search_catalogue(queries, vectors, 10, ranker="dense")
    assert_equal_lists(got, brute_force(queries, vectors, 10))


def test_autocast_changes_nothing():
    queries, vectors = near_ties(num_items=100, num_queries=20)
    expected = search_catalogue(queries, vectors, 10, ranker="dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_lists(search_catalogue(queries, vectors, 10, ranker="dense"), expected)


def test_products_of_reduced_precision_change_nothing(monkeypatch):
    """As a GPU makes them where PyTorch is told that it may, here with bfloat16 for its inputs."""
    queries, vectors = near_ties(num_items=100)
    expected = search_catalogue(queries, vectors, 10, ranker="dense")
    product = torch.mm
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr(torch, "mm", lambda x, y, **to: product(x.bfloat16().float(), y.bfloat16().float(), **to))
    assert_equal_lists(search_catalogue(queries, vectors, 10, ranker="dense"), expected)


@pytest.mark.parametrize(("bad", "place"), [(torch.nan, "query"), (torch.inf, "vector"), (1e30, "both")])
def test_what_is_no_number_is_an_error(bad, place):
    queries, vectors = torch.ones(3, 4), torch.ones(9, 4)
    if place != "vector":
        queries[1, 2] = bad
    if place != "query":
        vectors[5, 0] = bad
    with pytest.raises(InputError, match="ranker 'dense' gave NaN scores"):
        search_catalogue(queries, vectors, 2, ranker="dense")


def test_broken_vectors_of_items_that_are_not_available_do_not_count():
    vectors = torch.ones(9, 4)
    vectors[5] = torch.nan
    item_ids, _ = search_catalogue(torch.ones(1, 4), vectors, 9, available=torch.arange(9) != 5, ranker="dense")
    assert item_ids.tolist() == [[0, 1, 2, 3, 4, 6, 7, 8, -1]]


def test_shapes_that_do_not_fit_are_errors():
    queries, vectors = torch.ones(3, 4), torch.ones(9, 4)
    with pytest.raises(ValueError, match=r"got \[3, 4\] and \[9, 5\]"):
        search_catalogue(queries, torch.ones(9, 5), 2, ranker="dense")
    with pytest.raises(ValueError, match=r"filter of 3 rows .* got 2 rows"):
        search_catalogue(queries, vectors, 2, ItemFilter.from_lists([[], []]), ranker="dense")
    with pytest.raises(ValueError, match="flags of 9 items, got 8"):
        search_catalogue(queries, vectors, 2, available=torch.ones(8, dtype=torch.bool), ranker="dense")


def test_scores_of_own_items():
    queries = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    vectors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    scores = score_items(queries, vectors, torch.tensor([[0, 1, 2], [2, -1, 0]]))
    assert scores.tolist() == [[1.0, 5.0, 12.0], [-1.0, -torch.inf, 0.5]]


def test_own_items_in_order():
    queries = torch.tensor([[1.0], [1.0]])
    vectors = torch.tensor([[3.0], [1.0], [3.0], [2.0]])
    item_ids, scores = rank_items(queries, vectors, torch.tensor([[2, 3, 0], [-1, 1, -1]]), 4, ranker="dense")
    assert item_ids.tolist() == [[0, 2, 3, -1], [1, -1, -1, -1]]
    assert scores.tolist() == [[3.0, 3.0, 2.0, -torch.inf], [1.0, -torch.inf, -torch.inf, -torch.inf]]
