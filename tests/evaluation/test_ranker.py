import pytest
import torch

from data.schemas import InputError
from evaluation.ranker import check_ranking
from modules.top_items import top_items

INF = float("inf")


def test_ties_go_to_the_lowest_item_id():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    item_ids, values = top_items(scores, 2)
    assert item_ids.tolist() == [[1, 2], [0, 1]]
    assert values.tolist() == [[3.0, 3.0], [2.0, 2.0]]


def test_top_items_equals_a_stable_sort_of_everything():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (63, 41), generator=generator).float()
    scores[scores == 0] = -INF
    for k in (0, 1, 7, 41):
        values, order = scores.sort(dim=1, descending=True, stable=True)
        expected = order.masked_fill(values == -INF, -1)[:, :k]
        torch.testing.assert_close(top_items(scores, k)[0], expected)


def test_top_items_pads_with_minus_one_and_minus_infinity():
    item_ids, values = top_items(torch.tensor([[1.0, -INF, 2.0]]), 5)
    assert item_ids.tolist() == [[2, 0, -1, -1, -1]]
    assert values.tolist() == [[2.0, 1.0, -INF, -INF, -INF]]
    assert item_ids.dtype == torch.int64


def test_allowed_may_be_shared_or_per_row():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert top_items(scores, 1, torch.tensor([False, True, True]))[0].tolist() == [[1], [1]]
    per_row = torch.tensor([[False, False, True], [True, True, True]])
    assert top_items(scores, 1, per_row)[0].tolist() == [[2], [0]]


def test_nan_scores_are_refused():
    with pytest.raises(InputError, match="'mine' gave NaN scores"):
        top_items(torch.tensor([[1.0, float("nan")]]), 1, ranker="mine")


def check(item_ids: list[list[int]], scores: list[list[float]], *, num_rows: int = 1, k: int = 3) -> None:
    check_ranking("mine", torch.tensor(item_ids), torch.tensor(scores), num_rows=num_rows, k=k, num_items=5)


def test_a_good_ranking_passes():
    check([[4, 0, -1], [-1, -1, -1]], [[1.0, 1.0, -INF], [-INF, -INF, -INF]], num_rows=2)


@pytest.mark.parametrize(
    ("item_ids", "scores", "expected"),
    [
        ([[0, 1]], [[2.0, 1.0]], r"item_ids of shape \[1, 3\].*got \[1, 2\]"),
        ([[0, 1, 2]], [[2.0, 1.0]], r"scores of shape \[1, 3\].*got \[1, 2\]"),
        ([[0, 1, 0]], [[3.0, 2.0, 1.0]], r"distinct items.*\[0, 1, 0\]"),
        ([[0, 1, 5]], [[3.0, 2.0, 1.0]], r"item ids in \[-1, 5\)"),
        ([[0, 1, -2]], [[3.0, 2.0, 1.0]], r"item ids in \[-1, 5\)"),
        ([[0, 1, 2]], [[3.0, 1.0, 2.0]], "never rise"),
        ([[0, 1, -1]], [[3.0, 2.0, 1.0]], "score -inf exactly where"),
        ([[0, 1, 2]], [[3.0, 2.0, -INF]], "score -inf exactly where"),
        ([[0, -1, 2]], [[3.0, -INF, 1.0]], "only at the end"),
    ],
)
def test_breaches_of_the_contract_name_the_ranker(item_ids, scores, expected):
    with pytest.raises(ValueError, match=f"(?s)'mine'.*{expected}"):
        check(item_ids, scores)


def test_a_nan_in_a_list_is_an_input_error():
    with pytest.raises(InputError, match="'mine' gave NaN"):
        check([[0, 1, 2]], [[float("nan"), 2.0, 1.0]])


def test_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int64, got \[1, 1\] and torch\.int32"):
        check_ranking("mine", torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1), num_rows=1, k=1, num_items=5)
