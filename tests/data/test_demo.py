"""The demo shop: deterministic, long-tailed, learnable, not rigged, and true to the law that its oracle states."""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from data.batching import cold_items, evaluation_batches
from data.processed import DatasetConfig, PreparedDataset, RecDataset, load_dataset
from data.schemas import Catalogue, InputError, SeqBatch, user_hashes
from data.sources.base import SourceTables
from data.sources.demo import DemoSource, OracleRanker
from data.sources.demo_world import MAX_PURCHASES, MIN_PURCHASES, DemoWorld
from tests.item_filters import filter_of

DIGEST_OF_SEED_0 = "b4c7b2876552933ddb3b8b85c81ad2af4c32ae2b616980b58ae679e687ee54e5"


@cache
def world() -> DemoWorld:
    return DemoWorld(0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreparedDataset:
    return load_dataset(DatasetConfig(dataset=RecDataset.DEMO, root=str(tmp_path_factory.mktemp("demo"))))


@pytest.fixture(scope="module")
def batches(dataset) -> list[SeqBatch]:
    ranges = dataset.split("leave_one_out").test
    return list(evaluation_batches(dataset.histories, ranges, max_history=20, batch_size=1000))


def recall(lists: torch.Tensor, targets: torch.Tensor) -> float:
    return (lists == targets[:, None]).any(dim=1).float().mean().item()


@cache
def tables_of(seed: int) -> SourceTables:
    return DemoSource(seed).read(Path())


def test_the_seed_decides_every_byte():
    tables = tables_of(0)
    text = tables.items.write_csv() + tables.interactions.write_csv()
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST_OF_SEED_0
    assert not tables_of(1).interactions.equals(tables.interactions)


def test_tables_have_the_promised_columns_and_sizes():
    tables = tables_of(0)
    assert tables.items.columns == ["item_key", "title", "category", "brand", "price"]
    assert tables.items.null_count().sum_horizontal().item() == 0
    assert len(tables.items) == tables.items["item_key"].n_unique() == tables.items["title"].n_unique() == 1000
    assert tables.interactions.schema == {"user_key": pl.String, "item_key": pl.String, "timestamp": pl.Int64}
    assert tables.interactions["user_key"].n_unique() == 3000
    assert tables.interactions["timestamp"].is_sorted()
    assert DemoSource(0).raw_files() == []


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="must be 0 or more, got -1"):
        DemoSource(-1)


def test_histories_have_the_promised_lengths_and_no_repeats():
    lengths = (world().purchases >= 0).sum(axis=1)
    assert lengths.min() == MIN_PURCHASES
    assert lengths.max() <= MAX_PURCHASES
    assert 9.5 < lengths.mean() < 10.5
    for bought, length in zip(world().purchases, lengths, strict=True):
        assert len(set(bought[:length].tolist())) == length
        assert (bought[length:] == -1).all()
    assert (np.diff(world().customers.times, axis=1) > 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_popularity_is_long_tailed(seed):
    counts = tables_of(seed).interactions["item_key"].value_counts(sort=True)["count"]
    assert 0.5 <= counts.head(100).sum() / counts.sum() <= 0.6


def test_late_items_are_the_cold_targets(dataset):
    split = dataset.split("leave_one_out")
    cold = cold_items(dataset.histories, split, len(dataset.catalogue))
    targets = dataset.histories.item_ids[(dataset.histories.offsets[split.test.rows.long()] + split.test.ends).long()]
    late_keys = {key for key, late in zip(world().items.keys, world().items.late, strict=True) if late}
    cold_targets = [dataset.catalogue.item_keys[item] for item in targets[cold[targets.long()]].tolist()]
    assert 10 <= len(cold_targets) <= 100
    assert sum(key in late_keys for key in cold_targets) / len(cold_targets) > 0.8


def test_nothing_is_bought_before_it_is_on_sale():
    items, times = world().purchases, world().customers.times
    launched = world().next_purchase(np.zeros(1, dtype=int), np.zeros((1, 0), dtype=int), np.array([2**40]))[0] > 0
    assert launched.all()
    late = (items >= 0) & world().items.late[items]
    assert late.sum() > 0
    users, steps = np.nonzero(late)
    chance = world().next_purchase(users, np.zeros((len(users), 0), dtype=int), times[users, steps] - 86_400 * 60)
    assert (chance[np.arange(len(users)), items[users, steps]] == 0).all()


def test_a_second_purchase_follows_the_first_or_taste_as_computed_by_hand():
    """After a tent: 0.58 of the chance stays in Camping, 0.42 goes by taste, and types that one owns count 0.2."""
    items = world().items
    tent = items.titles.index(next(title for title in items.titles if " Tent, " in title))
    chance = world().next_purchase(np.array([7]), np.array([[tent]]), np.array([2**40]))[0]
    assert chance.sum() == pytest.approx(1.0)
    assert chance[tent] == 0.0
    camping, noun = np.array([category.split(" > ")[::2] for category in items.categories]).T
    other_tents = chance[noun == "Tent"].sum()
    tents_by_taste = other_tents / (0.2 + 0.8 * other_tents)
    taste = world().customers.departments[7, items.departments[tent]]
    lost = 0.8 * tents_by_taste
    assert chance[camping == "Camping"].sum() == pytest.approx((0.58 + 0.42 * taste - lost) / (1 - lost))
    assert chance[noun == "Sleeping Bag"].sum() > other_tents


def test_frequencies_agree_with_the_stated_probabilities():
    """The oracle's expected and actual number of hits among its ten favourites differ by chance alone."""
    users = np.arange(3000)
    num_bought = (world().purchases >= 0).sum(axis=1) - 1
    bought = np.where(np.arange(MAX_PURCHASES) < num_bought[:, None], world().purchases, -1)
    chance = world().next_purchase(users, bought, world().customers.times[users, num_bought])
    favourites = np.argsort(-chance, axis=1)[:, :10]
    expected = np.take_along_axis(chance, favourites, axis=1).sum(axis=1)
    hits = (favourites == world().purchases[users, num_bought][:, None]).any(axis=1)
    deviation = np.sqrt((expected * (1 - expected)).sum())
    assert abs(hits.sum() - expected.sum()) < 3 * deviation


def test_the_oracle_is_far_above_popularity_and_can_rank_cold_items(dataset, batches):
    oracle = OracleRanker(world(), dataset.catalogue)
    lists = torch.cat([oracle.rank(batch, 10)[0] for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    counts = torch.bincount(dataset.histories.item_ids.long(), minlength=1000)
    popular = counts.argsort(descending=True)[:10].expand(len(targets), -1)
    assert 0.5 < recall(lists, targets) < 0.62
    assert 0.05 < recall(popular, targets) < 0.14
    cold = cold_items(dataset.histories, dataset.split("leave_one_out"), 1000)[targets]
    assert recall(lists[cold], targets[cold]) > 0.3


def test_oracle_keeps_the_ranker_contract(dataset, batches):
    oracle = OracleRanker(world(), dataset.catalogue)
    batch = batches[0]
    item_ids, scores = oracle.rank(batch, 1003)
    owned = batch.offsets[1].item()  # of the first row, whose history is whole
    assert item_ids.shape == scores.shape == (len(batch), 1003)
    assert item_ids.dtype == torch.int64
    assert scores.dtype == torch.float32
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert (item_ids == -1).equal(scores == -torch.inf)
    assert (item_ids[0] >= 0).sum() <= 1000 - owned
    allowed = torch.zeros(1000, dtype=torch.bool)
    allowed[[3, 5]] = True
    assert set(oracle.rank(batch, 3, filter_of(allowed, len(batch)))[0].flatten().tolist()) == {3, 5, -1}
    per_row = allowed.repeat(len(batch), 1)
    per_row[1] = False
    assert oracle.rank(batch, 3, filter_of(per_row, len(batch)))[0][1].tolist() == [-1, -1, -1]


def test_cutting_a_history_does_not_blind_the_oracle(dataset):
    ranges = dataset.split("leave_one_out").test
    oracle = OracleRanker(world(), dataset.catalogue)
    whole = next(evaluation_batches(dataset.histories, ranges, max_history=40, batch_size=64))
    cut = next(evaluation_batches(dataset.histories, ranges, max_history=1, batch_size=64))
    torch.testing.assert_close(oracle.rank(whole, 20), oracle.rank(cut, 20))


def test_oracle_ranks_an_empty_history_and_refuses_strangers(dataset):
    oracle = OracleRanker(world(), dataset.catalogue)
    customer = torch.from_numpy(user_hashes(world().customers.keys[:1]))
    empty = SeqBatch(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0], dtype=torch.int32), 0, customer)
    assert (oracle.rank(empty, 10)[0] >= 0).all()
    with pytest.raises(InputError, match="1 of 1 users are not customers of this demo"):
        oracle.rank(SeqBatch.from_lists([[0]]), 10)
    with pytest.raises(InputError, match="item 'other' is unknown"):
        OracleRanker(world(), Catalogue(["other"], [""], [""]))


def test_nothing_that_an_item_shows_names_its_successor(dataset, batches):
    """Ranking by any public trait of the last item (row, key, price, text) finds few targets."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    targets = torch.cat([batch.targets for batch in batches])
    last = torch.cat([batch.item_ids[batch.offsets[1:].long() - 1] for batch in batches])
    texts = TfidfVectorizer().fit_transform(dataset.item_texts(dataset.text_template))
    prices = pl.read_parquet(dataset.folder / "items.parquet")["price"].to_torch()
    keys = torch.tensor([int(key.removeprefix("demo-"), 16) for key in dataset.catalogue.item_keys])
    similarities = {
        "row": -(torch.arange(1000)[:, None] - torch.arange(1000)).abs(),
        "key": -(keys[:, None] - keys).abs(),
        "price": -(prices[:, None] - prices).abs(),
        "text": torch.from_numpy((texts @ texts.T).toarray()),
    }
    for name, similarity in similarities.items():
        found = similarity.fill_diagonal_(similarity.min()).topk(10).indices[last]
        assert recall(found, targets) < (0.1 if name == "text" else 0.03), name


def test_product_types_predict_better_than_popularity(dataset, batches):
    """What follows a type is learnable from the training part: the demo rewards models that share between items."""
    nouns = [category.split(" > ")[-1] for category in dataset.catalogue.categories]
    types = torch.tensor([sorted(set(nouns)).index(noun) for noun in nouns])
    train = dataset.split("leave_one_out").train
    offsets, item_ids = dataset.histories.offsets, dataset.histories.item_ids.long()
    follows = torch.zeros(120, 1000)
    counts = torch.zeros(1000)
    for begin, end in zip(offsets[train.rows.long()].tolist(), train.ends.tolist(), strict=True):
        seen = item_ids[begin : begin + end + 1]
        follows.index_put_((types[seen[:-1]], seen[1:]), torch.ones(len(seen) - 1), accumulate=True)
        counts.index_put_((seen,), torch.ones(len(seen)), accumulate=True)
    targets = torch.cat([batch.targets for batch in batches])
    last = torch.cat([batch.item_ids[batch.offsets[1:].long() - 1] for batch in batches])
    lists = (follows + counts * 1e-6).topk(10).indices[types[last]]
    assert recall(lists, targets) > 0.4
