"""Rows of a feature file for the items of a catalogue, in its order."""

from collections.abc import Sequence

import numpy as np

from data.feature_files import FeatureFile
from data.parquet_features import examples
from data.schemas import InputError

_BLOCK_ROWS = 8192


def align_features(features: FeatureFile, item_keys: Sequence[str]) -> FeatureFile | np.ndarray:
    """The feature rows of items: the file itself where it has them in their order, else a copy in memory.

    A file without keys must have a row per item, in the order of the items. Rows of other items are left out.

    Args:
        features: [M, D].
        item_keys: of N items, distinct.

    Returns:
        [N, D], to be read in slices.

    Raises:
        InputError: if an item has no row or several, or a file without keys has another number of rows.
    """
    if not features.has_keys:
        if len(features) != len(item_keys):
            raise InputError(
                f"{features.path} has {len(features):,} rows and no item keys, expected a row for each of "
                f"{len(item_keys):,} items. Put the keys beside it, one a line."
            )
        return features
    places = _places(features, item_keys)
    if len(places) == len(item_keys) and np.array_equal(places, np.arange(len(places))):
        return features
    gathered = np.empty((len(item_keys), features.shape[1]), dtype=features[:1].dtype)
    put_rows(features, places, gathered)
    return gathered


def _places(features: FeatureFile, item_keys: Sequence[str]) -> np.ndarray:
    """[M] the item that each row is of, -1 for other items."""
    positions = {key: place for place, key in enumerate(item_keys)}
    places = np.full(len(features), -1, dtype=np.int64)
    for begin in range(0, len(features), _BLOCK_ROWS):
        keys = features.item_keys(begin, min(begin + _BLOCK_ROWS, len(features)))
        assert keys is not None
        places[begin : begin + len(keys)] = [positions.get(key, -1) for key in keys]
    counts = np.bincount(places[places >= 0], minlength=len(item_keys))
    for what, wrong in (("lacks", np.flatnonzero(counts == 0)), ("repeats", np.flatnonzero(counts > 1))):
        if len(wrong):
            raise InputError(
                f"{features.path} {what} {len(wrong):,} of {len(item_keys):,} items: "
                f"{examples([item_keys[place] for place in wrong.tolist()])}. Give each item one row; keys must be "
                "written alike."
            )
    return places


def put_rows(features: FeatureFile, places: np.ndarray, target: np.ndarray) -> None:
    """Write the rows of a file, in one pass over it, to their places in `target` [N, D].

    Args:
        features: [M, D].
        places: [M] where each row goes; rows of -1 are left out.
        target: of any float dtype; in memory, or a memory map.
    """
    for begin in range(0, len(features), _BLOCK_ROWS):
        block = features[begin : min(begin + _BLOCK_ROWS, len(features))]
        wanted = places[begin : begin + len(block)]
        target[wanted[wanted >= 0]] = block[wanted >= 0]
