from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.schemas import Histories, InputError, ItemFilter, Ranges, SeqBatch
from evaluation.evaluator import evaluate, evaluate_rankers, save_ranks
from evaluation.ranker import Ranker
from evaluation.training_items import never_repeats
from modules.top_items import top_items

COLD = torch.tensor([False, False, False, False, True])


@dataclass
class FixedScores:
    """Gives every row the same scores."""

    scores: Tensor
    name: str = "fixed"

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        flags = None if allowed is None else allowed.flags(self.scores.shape[-1])
        return top_items(self.scores.expand(len(histories), -1), k, flags, ranker=self.name)


@dataclass
class Unchecked:
    """Returns what it was told, good or bad."""

    item_ids: Tensor
    scores: Tensor
    name: str = "unchecked"

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        return self.item_ids, self.scores


def batch(histories: list[list[int]], targets: list[int]) -> SeqBatch:
    made = SeqBatch.from_lists(histories)
    return SeqBatch(made.item_ids, made.offsets, made.max_len, made.user_hashes, torch.tensor(targets))


DESCENDING = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # the list is 0, 1, 2, 3, 4


def test_ranks_targets_and_keys():
    batches = [batch([[1], [2, 3]], [0, 4]), batch([[]], [2])]
    result = evaluate(FixedScores(DESCENDING), batches, cold=COLD, split="test")
    assert result.ranks.tolist() == [1, 5, 3]
    assert result.ranks.dtype == torch.int32
    assert result.targets.tolist() == [0, 4, 2]
    assert result.rows.tolist() == [0, 1, 2]
    assert result.metrics["fixed/test/all/count"] == 3
    assert result.metrics["fixed/test/all/recall@1"] == pytest.approx(1 / 3)
    assert result.metrics["fixed/test/warm/mrr@20"] == pytest.approx((1 + 1 / 3) / 2)
    assert result.metrics["fixed/test/cold/recall@5"] == 1.0
    assert result.metrics["fixed/test/cold/recall@1"] == 0.0
    assert "fixed/test/all/ndcg@10_ci95_low" in result.metrics
    assert "fixed/test/all/ndcg@10_ci95_high" in result.metrics


def test_the_last_small_batch_weighs_by_its_rows():
    """A mean of batch means would give 0.5."""
    batches = [batch([[]] * 3, [0, 0, 0]), batch([[]], [4])]
    result = evaluate(FixedScores(DESCENDING), batches, cold=COLD, split="valid", k=1)
    assert result.metrics["fixed/valid/all/recall@1"] == 0.75


def test_exclude_seen_takes_the_history_out_for_every_ranker():
    batches = [batch([[0, 1], [4]], [2, 0])]
    kept = evaluate(FixedScores(DESCENDING), batches, cold=COLD, split="test")
    excluded = evaluate(FixedScores(DESCENDING), batches, cold=COLD, split="test", exclude_seen=True)
    assert kept.ranks.tolist() == [3, 1]
    assert excluded.ranks.tolist() == [1, 1]


def test_a_nan_score_stops_the_evaluation():
    ranker = Unchecked(torch.tensor([[0, 1]]), torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(InputError, match="'unchecked' gave NaN"):
        evaluate(ranker, [batch([[]], [0])], cold=COLD, split="test", k=2)


def test_a_breach_of_the_contract_stops_the_evaluation():
    ranker = Unchecked(torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"'unchecked'.*distinct"):
        evaluate(ranker, [batch([[]], [0])], cold=COLD, split="test", k=2)


@pytest.mark.parametrize("target", [-1, 5])
def test_targets_outside_the_catalogue_are_refused(target: int):
    with pytest.raises(InputError, match=r"targets in \[0, 5\)"):
        evaluate(FixedScores(DESCENDING), [batch([[]], [target])], cold=COLD, split="test")


def test_batches_without_targets_are_refused():
    with pytest.raises(InputError, match="batches with targets"):
        evaluate(FixedScores(DESCENDING), [SeqBatch.from_lists([[1]])], cold=COLD, split="test")


def test_evaluate_rankers_merges_metrics_and_saves_ranks(tmp_path):
    path = tmp_path / "new" / "ranks.safetensors"
    rankers = [FixedScores(DESCENDING, "up"), FixedScores(-DESCENDING, "down")]
    rows = torch.tensor([7, 9])
    metrics = evaluate_rankers(
        rankers, lambda: iter([batch([[], []], [0, 1])]), cold=COLD, split="test", k=2, rows=rows, ranks_path=path
    )
    assert metrics["up/test/all/recall@1"] == 0.5
    assert metrics["down/test/all/recall@1"] == 0.0
    saved = load_file(path)
    assert sorted(saved) == ["ranks/down", "ranks/up", "rows", "targets"]
    assert saved["ranks/up"].tolist() == [1, 2]
    assert saved["ranks/up"].dtype == torch.int32
    assert saved["ranks/down"].tolist() == [0, 0]
    assert saved["rows"].tolist() == [7, 9]
    assert saved["targets"].tolist() == [0, 1]
    assert [file.name for file in path.parent.iterdir()] == ["ranks.safetensors"]


def test_rankers_of_one_name_are_refused():
    with pytest.raises(InputError, match="distinct names"):
        evaluate_rankers([FixedScores(DESCENDING)] * 2, lambda: [], cold=COLD, split="test")


def test_save_ranks_refuses_different_examples(tmp_path):
    first = evaluate(FixedScores(DESCENDING), [batch([[]], [0])], cold=COLD, split="test")
    second = evaluate(FixedScores(DESCENDING, "other"), [batch([[]], [1])], cold=COLD, split="test")
    with pytest.raises(InputError, match="'other' and 'fixed' differ"):
        save_ranks(tmp_path / "ranks.safetensors", [first, second])


def test_save_ranks_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = evaluate(FixedScores(DESCENDING), [batch([[]], [0])], cold=COLD, split="test")
    with pytest.raises(InputError, match="could not be written"):
        save_ranks(tmp_path / "file" / "ranks.safetensors", [result])


def test_one_row_number_per_example():
    with pytest.raises(InputError, match="got 2 rows, 1 examples"):
        evaluate(FixedScores(DESCENDING), [batch([[]], [0])], cold=COLD, split="test", rows=torch.tensor([1, 2]))


def test_rankers_satisfy_the_protocol():
    assert isinstance(FixedScores(DESCENDING), Ranker)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def histories(*rows: list[int]) -> Histories:
    made = SeqBatch.from_lists(list(rows))
    return Histories(made.offsets, made.item_ids.int(), torch.zeros_like(made.item_ids), made.user_hashes)


def test_training_items_are_counted_once_where_ranges_overlap():
    ranges = Ranges(rows=int32(1, 1), begins=int32(0, 1), ends=int32(1, 2))
    rows, item_ids = ranges.interactions(histories([9, 9], [5, 6, 7, 8]))
    assert rows.tolist() == [1, 1, 1]
    assert item_ids.tolist() == [5, 6, 7]


def test_never_repeats_looks_at_training_items_of_one_user_only():
    stored = histories([1, 2, 1], [2, 3, 3])
    until_second = Ranges(rows=int32(0, 1), begins=int32(0, 0), ends=int32(1, 1))
    assert never_repeats(stored, until_second)
    assert not never_repeats(stored, Ranges(rows=int32(0), begins=int32(0), ends=int32(2)))
