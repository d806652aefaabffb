import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.batching import cold_items, evaluation_batches
from data.processed import DatasetConfig, RecDataset, load_dataset
from data.schemas import Histories, InputError, Ranges, SeqBatch
from evaluation.evaluator import evaluate_rankers
from evaluation.ranker import Ranker, check_ranking
from evaluation.training_items import never_repeats
from modules.baselines.item_knn import ItemKNNConfig, ItemKNNRanker
from modules.baselines.popularity import PopularityConfig, PopularityRanker
from modules.baselines.random import RandomConfig, RandomRanker
from modules.baselines.user_knn import UserKNNConfig, UserKNNRanker
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
    ranker = ItemKNNRanker.fit(*prepared([[0, 1], [1, 0], [0, 2]]), 5, ItemKNNConfig(shrinkage=0.0))
    assert ranker.neighbours[:3, :2].tolist() == [[1, 2], [0, -1], [0, -1]]
    expected = torch.tensor([[2 / math.sqrt(6), 1 / math.sqrt(3)], [2 / math.sqrt(6), 0], [1 / math.sqrt(3), 0]])
    torch.testing.assert_close(ranker.similarities[:3, :2], expected)
    assert ranker.similarities[3:].count_nonzero() == 0


def test_item_knn_shrinks_similarities_that_few_users_support():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1], [1, 0], [0, 2]]), 5, ItemKNNConfig(shrinkage=2.0))
    assert float(ranker.similarities[0, 0]) == pytest.approx(2 / (math.sqrt(6) + 2))
    assert float(ranker.similarities[0, 1]) == pytest.approx(1 / (math.sqrt(3) + 2))


def test_item_knn_weighs_recent_items_more():
    """Item 0 speaks for 2 and item 1 for 3, equally; the last item of the history decides."""
    histories, ranges = prepared([[0, 2], [1, 3]])
    ranker = ItemKNNRanker.fit(histories, ranges, 5, ItemKNNConfig(decay=0.5, shrinkage=0.0))
    item_ids, scores = ranker.rank(SeqBatch.from_lists([[0, 1], [1, 0], []]), 3)
    assert item_ids.tolist() == [[3, 2, -1], [2, 3, -1], [-1, -1, -1]]
    assert scores.tolist() == [[1.0, 0.5, -INF], [1.0, 0.5, -INF], [-INF, -INF, -INF]]


def test_item_knn_sums_over_the_history_and_breaks_ties_by_lowest_id():
    ranker = ItemKNNRanker.fit(*prepared([[0, 3], [0, 2], [1, 2], [1, 3]]), 5, ItemKNNConfig(decay=1.0))
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
    ranker = ItemKNNRanker.fit(*prepared(rows), 5, ItemKNNConfig(num_neighbours=2, shrinkage=0.0))
    assert ranker.neighbours[0].tolist() == [2, 3]


def test_item_knn_counts_the_last_items_of_a_user():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1, 2, 3]]), 5, ItemKNNConfig(max_user_items=2))
    assert ranked(ranker, [[2], [0]], 2) == [[3, -1], [-1, -1]]


def test_item_knn_with_allowed_items():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1, 2, 3]]), 5)
    assert ranked(ranker, [[0]], 2, torch.tensor([True, False, True, True, True])) == [[2, 3]]
    assert ranked(ranker, [[0]], 2, torch.tensor([[True, False, False, True, True]])) == [[3, -1]]


def test_item_knn_does_not_depend_on_block_or_batch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, (6,), generator=generator).tolist() for _ in range(20)]
    whole = ItemKNNRanker.fit(*prepared(rows), 5)
    monkeypatch.setattr("modules.baselines.item_knn._BLOCK_ITEMS", 2)
    blocked = ItemKNNRanker.fit(*prepared(rows), 5)
    torch.testing.assert_close(whole.similarities, blocked.similarities)
    torch.testing.assert_close(whole.neighbours, blocked.neighbours)
    assert ranked(whole, rows, 4) == [ranked(whole, [row], 4)[0] for row in rows]


@pytest.mark.parametrize("wrong", [{"decay": 0.0}, {"decay": 1.5}, {"shrinkage": -1.0}, {"num_neighbours": 0}])
def test_item_knn_refuses_impossible_parameters(wrong: dict):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"ItemKNNConfig: {name} = {value} is out of range"):
        ItemKNNConfig(**wrong)


def test_item_knn_leaves_out_what_belongs_to_no_row():
    ranker = ItemKNNRanker.fit(*prepared([[0, 1], [1, 0], [0, 2]]), 5)
    batch = SeqBatch.from_lists([[1], []])
    expected = ranker.rank(batch, 3)[0].tolist()
    filled = ranker.rank(batch.to_capacity(num_rows=3, num_items=4), 3)[0].tolist()
    assert filled == [*expected, [-1, -1, -1]]


# Random


def test_random_lists_depend_on_seed_user_and_history_alone():
    ranker = RandomRanker.fit(*prepared([[0]]), 1000)
    batch = SeqBatch.from_lists([[1, 2], [2, 1], [1, 2, 2], [], [1, 2]])
    batch = replace(batch, user_hashes=torch.tensor([7, 7, 7, 7, 1 << 40]))
    lists = ranker.rank(batch, 20)[0]
    assert len({tuple(row) for row in lists.tolist()}) == 5
    alone = replace(SeqBatch.from_lists([[1, 2]]), user_hashes=torch.tensor([7]))
    assert torch.equal(ranker.rank(alone, 20)[0][0], lists[0])
    other = RandomRanker.fit(*prepared([[0]]), 1000, RandomConfig(seed=1))
    assert not torch.equal(other.rank(batch, 20)[0][0], lists[0])


def test_random_lists_every_item_alike():
    """2,000 lists of 5 of 20 items: each place is a draw of one in 20, 100 each expected; 4 deviations are 40."""
    ranker = RandomRanker.fit(*prepared([[0]]), 20)
    batch = replace(SeqBatch.from_lists([[user % 7] for user in range(2000)]), user_hashes=torch.arange(2000))
    item_ids, scores = ranker.rank(batch, 5)
    for place in range(5):
        counts = torch.bincount(item_ids[:, place], minlength=20)
        assert int(counts.min()) > 60
        assert int(counts.max()) < 140
    assert float(scores.min()) >= 0
    assert float(scores.max()) < 1


# UserKNN


def user_knn_scores(users: Sequence[Sequence[int]], history: Sequence[int], config: UserKNNConfig) -> dict[int, float]:
    """As UserKNNRanker's docstring says it."""
    weights = {item: config.decay**age for age, item in reversed(list(enumerate(reversed(history))))}
    norm = math.sqrt(sum(weight**2 for weight in weights.values()))
    similarity = {
        number: sum(weights.get(item, 0.0) for item in set(items))
        / (norm * math.sqrt(len(set(items))) + config.shrinkage or 1.0)
        for number, items in enumerate(users)
    }
    nearest = sorted(similarity, key=lambda number: -similarity[number])[: config.num_neighbours]
    scores: dict[int, float] = {}
    for number in nearest:
        for item in set(users[number]):
            scores[item] = scores.get(item, 0.0) + similarity[number]
    return {item: score for item, score in scores.items() if score > 0}


@pytest.mark.parametrize("config", [UserKNNConfig(num_neighbours=30), UserKNNConfig(shrinkage=0.0, decay=1.0)], ids=str)
def test_user_knn_equals_its_formula(config: UserKNNConfig):
    generator = torch.Generator().manual_seed(0)
    users = [torch.randint(40, (6,), generator=generator).tolist() for _ in range(25)]
    rows = [torch.randint(40, (size,), generator=generator).tolist() for size in (1, 4, 7, 0)]
    ranker = UserKNNRanker.fit(*prepared(users), 40, config)
    item_ids, scores = ranker.rank(SeqBatch.from_lists(rows), 40)
    for row, found_ids, found_scores in zip(rows, item_ids.tolist(), scores.tolist(), strict=True):
        expected = user_knn_scores(users, row, config)
        found = {item: score for item, score in zip(found_ids, found_scores, strict=True) if item >= 0}
        assert found == pytest.approx(expected, abs=1e-6)
        assert found_scores == sorted(found_scores, reverse=True)


def test_user_knn_takes_the_nearest_users_and_breaks_ties_by_lowest_id():
    """Users 0 and 1 share two items with the history, user 2 one; all neighbours alike vote for ties."""
    ranker = UserKNNRanker.fit(*prepared([[0, 1, 4], [0, 1, 3], [1, 2]]), 5, UserKNNConfig(num_neighbours=2))
    flags = torch.tensor([False, False, True, True, True])
    assert ranked(ranker, [[0, 1]], 4, flags) == [[3, 4, -1, -1]]


def test_user_knn_leaves_out_the_user_themselves():
    histories, ranges = prepared([[0, 3], [0, 1], [0, 1]])
    histories = replace(histories, user_hashes=torch.tensor([5, 6, 7]))
    ranker = UserKNNRanker.fit(histories, ranges, 5)
    batch = SeqBatch.from_lists([[0], [0]])
    assert ranker.rank(batch, 5)[0].tolist() == [[0, 1, 3, -1, -1]] * 2
    item_ids, _ = ranker.rank(replace(batch, user_hashes=torch.tensor([5, 9])), 5)
    assert item_ids.tolist() == [[0, 1, -1, -1, -1], [0, 1, 3, -1, -1]]


def test_user_knn_sees_training_ranges_only():
    ranker = UserKNNRanker.fit(*prepared([[0, 1, 4, 4], [0, 2, 4, 4]], held_out=2), 5)
    assert sorted(ranked(ranker, [[0]], 5)[0]) == [-1, -1, 0, 1, 2]
    assert ranked(ranker, [[4]], 2) == [[-1, -1]]


def test_user_knn_counts_the_last_items_of_a_user():
    ranker = UserKNNRanker.fit(*prepared([[0, 1, 2, 3]]), 5, UserKNNConfig(max_user_items=2))
    assert ranked(ranker, [[2], [0]], 2) == [[2, 3], [-1, -1]]


# All of them

KINDS = (
    (PopularityRanker, PopularityConfig()),
    (RandomRanker, RandomConfig(seed=3)),
    (ItemKNNRanker, ItemKNNConfig(num_neighbours=3)),
    (UserKNNRanker, UserKNNConfig(num_neighbours=4)),
)
of_every_kind = pytest.mark.parametrize(("kind", "config"), KINDS, ids=lambda value: getattr(value, "name", ""))


def some_histories() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, (length,), generator=generator).tolist() for length in (6, 1, 0, 30, 4, 9)]


@of_every_kind
def test_they_rank_alike_after_they_were_saved(kind, config):
    """Config and buffers are all there is to a ranker, so that an artifact can hold it."""
    rows = some_histories()
    ranker = kind.fit(*prepared([row for row in rows if row]), 5, config)
    assert isinstance(ranker, Ranker)
    copy = kind(type(config).from_dict(ranker.config.to_dict()))
    copy.load_state_dict(ranker.state_dict())
    batch = SeqBatch.from_lists(rows)
    for got, expected in zip(copy.rank(batch, 7), ranker.rank(batch, 7), strict=True):
        assert torch.equal(got, expected)


@of_every_kind
def test_they_do_not_depend_on_what_is_ranked_together(kind, config, monkeypatch):
    rows = some_histories()
    ranker = kind.fit(*prepared([row for row in rows if row]), 5, config)
    whole = ranked(ranker, rows, 4)
    assert [ranked(ranker, [row], 4)[0] for row in rows] == whole
    assert ranked(ranker.with_settings(batch_size=4), rows, 4) == whole
    monkeypatch.setattr("modules.baselines.counted._MAX_CELLS", 1)
    assert ranked(ranker, rows, 4) == whole
    allowed = filter_of(torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.6, 6)
    item_ids, _ = ranker.rank(SeqBatch.from_lists(rows), 5, allowed)
    flags = allowed.flags(5)
    assert all(flags[row, item] for row in range(6) for item in item_ids[row].tolist() if item >= 0)


@of_every_kind
def test_they_read_the_last_items_of_a_history(kind, config):
    rows = some_histories()
    ranker = kind.fit(*prepared([row for row in rows if row]), 5, config).with_settings(max_history=3)
    assert ranked(ranker, rows, 5) == ranked(ranker, [row[-3:] for row in rows], 5)


@of_every_kind
def test_an_empty_batch(kind, config):
    ranker = kind.fit(*prepared([[0, 1]]), 5, config)
    assert ranker.rank(SeqBatch.from_lists([]), 3)[0].shape == (0, 3)


def test_settings_are_checked():
    ranker = PopularityRanker.fit(*prepared([[0]]), 1)
    with pytest.raises(InputError, match="PopularityRanker expected max_history of at least 1, got 0"):
        ranker.with_settings(max_history=0)
    with pytest.raises(InputError, match="RandomConfig expected a seed from 0 to 2147483647, got -1"):
        RandomConfig(seed=-1)
    with pytest.raises(InputError, match=r"UserKNNConfig: decay = 2\.0 is out of range"):
        UserKNNConfig(decay=2.0)
    with pytest.raises(InputError, match="PopularityConfig does not know speed; valid names: num_items"):
        PopularityConfig.from_dict({"speed": 3})


@pytest.mark.slow
def test_baselines_on_beauty(shared_data: Path, tmp_path: Path):
    """Numbers that the README quotes; weak neighbours would flatter every model beside them."""
    config = DatasetConfig(
        dataset=RecDataset.AMAZON, category="beauty", root=str(tmp_path), raw_dir=str(shared_data / "amazon_p5")
    )
    dataset = load_dataset(config)
    histories, split, num_items = dataset.histories, dataset.split("leave_one_out"), len(dataset.catalogue)
    assert never_repeats(histories, split.train)
    metrics = evaluate_rankers(
        [kind.fit(histories, split.train, num_items) for kind in (PopularityRanker, ItemKNNRanker, UserKNNRanker)],
        lambda: evaluation_batches(histories, split.test, max_history=20, batch_size=512),
        cold=cold_items(histories, split, num_items),
        split="test",
        exclude_seen=True,
    )
    assert metrics["item_knn/test/all/count"] == 22_363
    assert metrics["item_knn/test/cold/count"] == 138
    assert metrics["popularity/test/all/recall@10"] == pytest.approx(0.0115, abs=5e-4)
    assert metrics["item_knn/test/all/recall@10"] == pytest.approx(0.0709, abs=1e-3)
    assert metrics["user_knn/test/all/recall@10"] == pytest.approx(0.0685, abs=1e-3)
