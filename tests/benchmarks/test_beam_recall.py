import json

import pytest
import torch

from benchmarks import beam_recall
from benchmarks.beam_recall import share_found, verify


def test_share_found_by_hand() -> None:
    exact = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]])
    assert share_found(torch.tensor([[4, 9, 1, 8], [6, 5, -1, -1]]), exact) == pytest.approx((0.5 + 1.0) / 2)


def test_a_wrong_score_is_noticed() -> None:
    exact_ids, exact_scores = torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]])
    verify(torch.tensor([[2, 7]]), torch.tensor([[-2.0, -9.0]]), exact_ids, exact_scores)
    with pytest.raises(AssertionError, match="differs from the exact one"):
        verify(torch.tensor([[2, 7]]), torch.tensor([[-2.5, -9.0]]), exact_ids, exact_scores)


def test_writes_rows_that_grow_with_the_width(tmp_path) -> None:
    assert beam_recall.main(["--quick", "--device", "cpu", "--results", str(tmp_path), "--widths", "1", "10"]) == 0
    (path,) = tmp_path.glob("*/beam_recall-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["beam_1", "beam_10", "exact"]
    shares = [row["share_of_exact_top_10"] for row in rows]
    assert 0.0 <= shares[0] <= 0.1 < shares[1] <= shares[2] == 1.0
