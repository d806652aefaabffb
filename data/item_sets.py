"""The items that a tokenizer is trained on: those of one data set, or of several that share their features' encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.batching import cold_items, held_out_rows
from data.features import FeatureConfig, ItemFeatures, load_item_features
from data.joined_rows import JoinedRows, RowMatrix
from data.processed import DatasetConfig, PreparedDataset, load_dataset
from data.schemas import Catalogue, InputError

_FITTED_ENCODERS = ("tfidf_svd",)
"""Encoders that are fitted on the items of one data set, so that another's features mean something else."""


@dataclass(frozen=True, eq=False)
class ItemSet:
    """The items of one data set.

    Attributes:
        prepared: the data set.
        catalogue: its items, with those marked cold that no training range of the split contains.
        features: of the items.
    """

    prepared: PreparedDataset
    catalogue: Catalogue
    features: ItemFeatures

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.prepared.name


def load_datasets(configs: Sequence[DatasetConfig]) -> list[PreparedDataset]:
    """The data sets, prepared where they are not yet.

    Raises:
        InputError: if one is named twice, or cannot be loaded.
    """
    prepared = [load_dataset(config) for config in configs]
    names = [dataset.name for dataset in prepared]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"data sets expected to be trained on together once each, got {', '.join(repeated)} twice.")
    return prepared


def load_item_sets(
    prepared: Sequence[PreparedDataset], configs: Sequence[DatasetConfig], features: FeatureConfig
) -> list[ItemSet]:
    """Items and features of data sets; features are encoded on first use.

    Args:
        prepared: of `load_datasets`.
        configs: what they were loaded by.
        features: of all of them.

    Raises:
        InputError: if features cannot be had, or do not mean the same for several data sets.
    """
    if len(prepared) > 1 and features.encoder in _FITTED_ENCODERS:
        raise InputError(
            f"FeatureConfig.encoder = {features.encoder!r} is fitted on the items of one data set, so its features of "
            f"{len(prepared)} data sets do not compare. Use sentence_transformers or file."
        )
    sets = []
    for dataset, config in zip(prepared, configs, strict=True):
        cold = cold_items(dataset.histories, dataset.split(config.split), len(dataset.catalogue))
        sets.append(ItemSet(dataset, replace(dataset.catalogue, cold=cold), load_item_features(dataset, features)))
    return sets


def joined_features(sets: Sequence[ItemSet]) -> RowMatrix:
    """The features of all items below each other, read where they lie."""
    if len(sets) == 1:
        return sets[0].features.values
    return JoinedRows([items.features.values for items in sets], names=[items.name for items in sets])


def training_rows(
    sets: Sequence[ItemSet], *, seen_only: bool, held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of the joined features to train on, and which to validate on.

    Items without features are in neither: they would teach the same made-up vector once each. They are coded as others.

    Args:
        sets: the items.
        seen_only: train on no item that is cold, so that ids of cold items are those of items never seen.
        held_out: share of the others to keep for validation.
        seed: of the choice.

    Returns:
        [M] and [V] int64 row numbers, ascending. Validation takes all others that have features, and where there are
        none, those of training.

    Raises:
        InputError: if no row is left to train on.
    """
    has_features = ~np.concatenate([items.features.missing for items in sets])
    chosen = has_features & ~np.concatenate([_cold(items) for items in sets]) if seen_only else has_features
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        what = "features of items that training histories contain" if seen_only else "items with features"
        raise InputError(f"train_on = {'seen' if seen_only else 'all'!r} expected {what}, got none.")
    rows = np.delete(rows, held_out_rows(len(rows), held_out, seed))
    left_out = np.setdiff1d(np.flatnonzero(has_features), rows, assume_unique=True)
    return rows, left_out if len(left_out) else rows


def _cold(items: ItemSet) -> np.ndarray:
    assert items.catalogue.cold is not None
    return items.catalogue.cold.numpy()
