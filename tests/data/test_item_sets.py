import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.features import FeatureConfig
from data.item_sets import ItemSet, joined_features, load_datasets, load_item_sets, training_rows
from data.processed import DatasetConfig, RecDataset, TablesConfig
from data.schemas import InputError

COLD = 2
"""Items of each data set that only test targets hold."""


def write_dataset(folder: Path, name: str, num_items: int) -> DatasetConfig:
    """Everyone walks through the first items; the last users end at items that nobody else has."""
    with (folder / f"{name}.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["user_id", "item_id", "timestamp"])
        for user in range(20):
            table.writerows([f"u{user}", f"{name}{(user + place) % (num_items - COLD)}", place] for place in range(5))
        table.writerows([f"u{user}", f"{name}{num_items - 1 - user}", 9] for user in range(COLD))
    tables = TablesConfig(interactions=str(folder / f"{name}.csv"), name=name)
    return DatasetConfig(dataset=RecDataset.TABLES, root=str(folder / "dataset"), min_interactions=0, tables=tables)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> list[DatasetConfig]:
    folder = tmp_path_factory.mktemp("sets")
    return [write_dataset(folder, "a", 9), write_dataset(folder, "b", 6)]


@pytest.fixture(scope="module")
def sets(configs, tmp_path_factory) -> list[ItemSet]:
    path = tmp_path_factory.mktemp("features") / "all.npy"
    keys = [f"b{number}" for number in range(6)] + [f"a{number}" for number in range(9)]
    np.save(path, np.arange(15, dtype=np.float32)[:, None] + [0.0, 100.0])
    path.with_suffix(".keys.txt").write_text("\n".join(keys) + "\n")
    return load_item_sets(load_datasets(configs), configs, FeatureConfig(encoder="file", path=str(path)))


def test_items_of_several_data_sets_lie_below_each_other(sets):
    assert [items.name for items in sets] == ["a", "b"]
    values = joined_features(sets)
    keys = [key for items in sets for key in items.catalogue.item_keys]
    numbers = [int(key[1:]) + 6 * (key[0] == "a") for key in keys]
    np.testing.assert_array_equal(values[:], np.array(numbers)[:, None] + [0.0, 100.0])
    assert joined_features(sets[:1]) is sets[0].features.values


def cold_rows(sets: list[ItemSet]) -> list[int]:
    cold_keys = {"a8", "a7", "b5", "b4"}
    keys = [key for items in sets for key in items.catalogue.item_keys]
    return [row for row, key in enumerate(keys) if key in cold_keys]


def test_all_rows_train_and_validate_where_none_is_left_out(sets):
    rows, valid_rows = training_rows(sets, seen_only=False, held_out=0.0, seed=0)
    assert rows.tolist() == valid_rows.tolist() == list(range(15))


def test_training_on_seen_items_leaves_the_cold_ones_to_validation(sets):
    rows, valid_rows = training_rows(sets, seen_only=True, held_out=0.0, seed=0)
    assert valid_rows.tolist() == cold_rows(sets)
    assert sorted([*rows, *valid_rows]) == list(range(15))


@pytest.mark.parametrize("seen_only", [False, True])
def test_held_out_rows_are_validated_on(sets, seen_only):
    rows, valid_rows = training_rows(sets, seen_only=seen_only, held_out=0.25, seed=0)
    assert len(rows) == (8 if seen_only else 11)  # of 11 seen ones 3, of 15 items 4 are held out
    assert sorted([*rows, *valid_rows]) == list(range(15))
    assert not set(rows) & set(cold_rows(sets)) or not seen_only
    assert training_rows(sets, seen_only=seen_only, held_out=0.25, seed=1)[0].tolist() != rows.tolist()


@pytest.mark.parametrize("seen_only", [False, True])
def test_items_without_features_are_neither_trained_nor_validated_on(sets, seen_only):
    cold = cold_rows(sets)
    gone = {0, cold[0], 10}
    missing = np.isin(np.arange(15), list(gone))
    parts = np.split(missing, [9])
    lacking = [
        replace(one, features=replace(one.features, missing=part)) for one, part in zip(sets, parts, strict=True)
    ]
    for held_out in (0.0, 0.25):
        rows, valid_rows = training_rows(lacking, seen_only=seen_only, held_out=held_out, seed=0)
        assert set(rows) | set(valid_rows) == set(range(15)) - gone
        assert not seen_only or not set(rows) & set(cold)
    nothing = [
        replace(one, features=replace(one.features, missing=np.ones(len(part), bool)))
        for one, part in zip(sets, parts, strict=True)
    ]
    with pytest.raises(InputError, match=r"train_on = .* expected .*features.*, got none"):
        training_rows(nothing, seen_only=seen_only, held_out=0.0, seed=0)


def test_no_seen_item_is_refused(sets):
    catalogue = sets[0].catalogue
    unseen = replace(sets[0], catalogue=replace(catalogue, cold=torch.ones(len(catalogue), dtype=torch.bool)))
    with pytest.raises(
        InputError, match="train_on = 'seen' expected features of items that training histories contain"
    ):
        training_rows([unseen], seen_only=True, held_out=0.0, seed=0)


def test_a_data_set_named_twice_is_refused(configs):
    with pytest.raises(InputError, match="once each, got a twice"):
        load_datasets([configs[0], configs[1], configs[0]])


def test_encoders_that_are_fitted_on_one_data_set_are_refused_for_several(configs):
    features = FeatureConfig(encoder="tfidf_svd", dim=4)
    with pytest.raises(InputError, match="'tfidf_svd' is fitted on the items of one data set"):
        load_item_sets(load_datasets(configs), configs, features)
