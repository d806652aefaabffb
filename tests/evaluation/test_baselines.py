import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.batching import cold_items, evaluation_batches
from data.processed import DatasetConfig, RecDataset, load_dataset
from data.schemas import Histories, InputError, Ranges, SeqBatch
from evaluation.baselines import ItemKNNRanker, PopularityRanker
from evaluation.evaluator import evaluate_rankers
from evaluation.ranker import Ranker, check_ranking
from evaluation.training_items import never_repeats
from tests.item_filters import filter_of

INF = float("inf")


def prepared(rows: list[list[int]], *, held_out: int = 0) -> tuple[Histories, Ranges]:
    """Histories whose training ranges end `held_out` items early."""
    batch = SeqBatch.from_lists(rows)
    histories = Histories(batch.offsets, batch.item_ids.int(), torch.zeros_like(batch.item_ids), batch.user_hashes)
    numbers = torch.arange(len(rows), dtype=torch.int32)
    ends = torch.tensor([len(row) - 1 - held_out for row in rows], dtype=torch.int32)
    return histories, Ranges(numbers, torch.zeros_like(numbers), ends)


def ranked(ranker: Ranker, rows: list[list[int]], k: int, flags: Tensor | None = None) -> list[list[int]]:
    allowed = None if flags is None else filter_of(flags, len(rows))
    item_ids, scores = ranker.rank(SeqBatch.from_lists(rows), k, allowed)
    check_ranking(ranker.name, item_ids, scores, num_rows=len(rows), k=k, num_items=5)
    return item_ids.tolist()


def test_popularity_counts_and_breaks_ties_by_lowest_id():
    ranker = PopularityRanker.fit(*prepared([[3, 1, 4], [3, 1], [4, 3]]), 5)
    assert ranker.counts.tolist() == [0, 2, 0, 3, 2]
    assert ranked(ranker, [[], [0]], 7) == [[3, 1, 4, 0, 2, -1, -1]] * 2


def test_popularity_sees_training_ranges_only():
    """Item 4 is every user's validation and test item; it must count nothing."""
    ranker = PopularityRanker.fit(*prepared([[0, 1, 4, 4], [1, 2, 4, 4]], held_out=2), 5)
    assert ranker.counts.tolist() == [1, 2, 1, 0, 0]


def test_popularity_with_allowed_items():
    ranker = PopularityRanker.fit(*prepared([[3, 1, 4], [3, 1], [4, 3]]), 5)
    shared = torch.tensor([True, True, True, False, True])
    assert ranked(ranker, [[], []], 2, shared) == [[1, 4], [1, 4]]
    per_row = torch.ones(2, 5, dtype=torch.bool)
    per_row[0, [3, 1, 4, 0]] = False
    assert ranked(ranker, [[], []], 2, per_row) == [[2, -1], [3, 1]]


def test_item_knn_similarities_by_hand():
    """Users: {0,1}, {0,1}, {0,2}. users(0)=3, users(1)=2, users(2)=1."""
    ranker = ItemKNNRanker.fit(*prepared([[0, 1], [1, 0], [0, 2]]), 5, shrinkage=0.0)
    assert ranker.neighbours[:3, :2].tolist() == [[1, 2], [0, -1], [0, -1]]
    expected = torch.tensor([[2 / math.sqrt(6), 1 / math.sqrt(3)], [2 / math.sqrt(6), 0], [1 / math.sqrt(3), 0]])
    torch.testing.assert_close(ranker.similarities[:3, :2], expected)
    assert ranker.similarities[3:].count_nonzero() == 0


def test_item_knn_shrinks_similarities_that_few_users_support():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1], [1, 0], [0, 2]]), 5, shrinkage=2.0)
    assert float(ranker.similarities[0, 0]) == pytest.approx(2 / (math.sqrt(6) + 2))
    assert float(ranker.similarities[0, 1]) == pytest.approx(1 / (math.sqrt(3) + 2))


def test_item_knn_weighs_recent_items_more():
    """Item 0 speaks for 2 and item 1 for 3, equally; the last item of the history decides."""
    histories, ranges = prepared([[0, 2], [1, 3]])
    ranker = ItemKNNRanker.fit(histories, ranges, 5, decay=0.5, shrinkage=0.0)
    item_ids, scores = ranker.rank(SeqBatch.from_lists([[0, 1], [1, 0], []]), 3)
    assert item_ids.tolist() == [[3, 2, -1], [2, 3, -1], [-1, -1, -1]]
    assert scores.tolist() == [[1.0, 0.5, -INF], [1.0, 0.5, -INF], [-INF, -INF, -INF]]


def test_item_knn_sums_over_the_history_and_breaks_ties_by_lowest_id():
    ranker = ItemKNNRanker.fit(*prepared([[0, 3], [0, 2], [1, 2], [1, 3]]), 5, decay=1.0)
    assert ranked(ranker, [[0, 1]], 4) == [[2, 3, -1, -1]]


def test_item_knn_sees_training_ranges_only():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1, 4, 4], [0, 1, 4, 4]], held_out=2), 5)
    assert ranked(ranker, [[0], [4]], 2) == [[1, -1], [-1, -1]]


def test_item_knn_ignores_repeated_interactions_of_one_user():
    once = ItemKNNRanker.fit(*prepared([[0, 1], [0, 2]]), 5)
    often = ItemKNNRanker.fit(*prepared([[0, 1, 1, 1], [0, 2]]), 5)
    torch.testing.assert_close(once.similarities, often.similarities)
    torch.testing.assert_close(once.neighbours, often.neighbours)


def test_item_knn_keeps_the_nearest_neighbours():
    rows = [[0, 1], [0, 2], [0, 2], [0, 3], [0, 3]]
    ranker = ItemKNNRanker.fit(*prepared(rows), 5, num_neighbours=2, shrinkage=0.0)
    assert ranker.neighbours[0].tolist() == [2, 3]


def test_item_knn_max_history_keeps_the_last_items():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1, 2, 3]]), 5, max_history=2)
    assert ranked(ranker, [[2], [0]], 2) == [[3, -1], [-1, -1]]


def test_item_knn_with_allowed_items():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1, 2, 3]]), 5)
    assert ranked(ranker, [[0]], 2, torch.tensor([True, False, True, True, True])) == [[2, 3]]
    assert ranked(ranker, [[0]], 2, torch.tensor([[True, False, False, True, True]])) == [[3, -1]]


def test_item_knn_does_not_depend_on_block_or_batch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, (6,), generator=generator).tolist() for _ in range(20)]
    whole = ItemKNNRanker.fit(*prepared(rows), 5)
    monkeypatch.setattr("evaluation.baselines._BLOCK_ITEMS", 2)
    blocked = ItemKNNRanker.fit(*prepared(rows), 5)
    torch.testing.assert_close(whole.similarities, blocked.similarities)
    torch.testing.assert_close(whole.neighbours, blocked.neighbours)
    assert ranked(whole, rows, 4) == [ranked(whole, [row], 4)[0] for row in rows]


@pytest.mark.parametrize("wrong", [{"decay": 0.0}, {"decay": 1.5}, {"shrinkage": -1.0}, {"num_neighbours": 0}])
def test_item_knn_refuses_impossible_parameters(wrong: dict):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        ItemKNNRanker.fit(*prepared([[0, 1]]), 5, **wrong)


def test_baselines_satisfy_the_protocol():
    assert isinstance(PopularityRanker.fit(*prepared([[0]]), 1), Ranker)
    assert isinstance(ItemKNNRanker.fit(*prepared([[0]]), 1), Ranker)


@pytest.mark.slow
def test_baselines_on_beauty(shared_data: Path, tmp_path: Path):
    """Numbers that the README quotes; a weak ItemKNN would flatter every model beside it."""
    config = DatasetConfig(
        dataset=RecDataset.AMAZON, category="beauty", root=str(tmp_path), raw_dir=str(shared_data / "amazon_p5")
    )
    dataset = load_dataset(config)
    histories, split, num_items = dataset.histories, dataset.split("leave_one_out"), len(dataset.catalogue)
    assert never_repeats(histories, split.train)
    metrics = evaluate_rankers(
        [ranker.fit(histories, split.train, num_items) for ranker in (PopularityRanker, ItemKNNRanker)],
        lambda: evaluation_batches(histories, split.test, max_history=20, batch_size=512),
        cold=cold_items(histories, split, num_items),
        split="test",
        exclude_seen=True,
    )
    assert metrics["item_knn/test/all/count"] == 22_363
    assert metrics["item_knn/test/cold/count"] == 138
    assert metrics["popularity/test/all/recall@10"] == pytest.approx(0.0115, abs=5e-4)
    assert metrics["item_knn/test/all/recall@10"] == pytest.approx(0.0709, abs=1e-3)


def test_item_knn_leaves_out_what_belongs_to_no_row():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1], [1, 0], [0, 2]]), 5)
    batch = SeqBatch.from_lists([[1], []])
    expected = ranker.rank(batch, 3)[0].tolist()
    filled = ranker.rank(batch.to_capacity(num_rows=3, num_items=4), 3)[0].tolist()
    assert filled == [*expected, [-1, -1, -1]]
