"""Items that join or leave a model artifact: its tokenizer and its item features change together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.schemas import InputError
from modules.artifact import ModelArtifact
from modules.feature_rows import FeatureMatrix, RowBlocks
from modules.item_table import ItemTable
from modules.tokenizer import living
from modules.tokenizer.tokenizer import SemanticIdTokenizer

_BLOCK_ROWS = 4096
"""Rows of features that are checked at once."""


def with_items(
    artifact: ModelArtifact,
    item_keys: Sequence[str],
    features: FeatureMatrix,
    *,
    titles: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    feature_description: Mapping[str, Any] | None = None,
) -> ModelArtifact:
    """The artifact with items added, see `SemanticIdTokenizer.with_items`; this one stays as it is.

    A model that reads item features gets those of the items, and those that come back have new ones from now on.

    Raises:
        InputError: as for the tokenizer; if the model has none, or reads features that its tokenizer does not.
    """
    before = artifact.tokenizer_for("adding items")
    tokenizer = before.with_items(
        item_keys, features, titles=titles, categories=categories, feature_description=feature_description
    )
    if tokenizer is before:
        return artifact
    items = artifact.items
    if items is not None:
        _check_one_encoder(tokenizer, artifact.manifest)
        items = _with_rows(items, list(item_keys), features, tokenizer)
    return artifact.with_catalogue(tokenizer, items)


def without_items(artifact: ModelArtifact, item_keys: Sequence[str]) -> ModelArtifact:
    """The artifact with items removed, see `SemanticIdTokenizer.without_items`; this one stays as it is.

    Raises:
        InputError: as for the tokenizer, or if the model has none.
    """
    before = artifact.tokenizer_for("removing items")
    tokenizer = before.without_items(item_keys)
    return artifact if tokenizer is before else artifact.with_catalogue(tokenizer, artifact.items)


def _check_one_encoder(tokenizer: SemanticIdTokenizer, manifest: Mapping[str, Any]) -> None:
    """One row of features per item has to do for both (InputError)."""
    try:
        living.check_same_encoder(tokenizer.manifest.get("features", {}), manifest.get("item_features"))
    except InputError as error:
        raise InputError(
            f"no item can join a model that reads other features than its tokenizer was fitted on: {error}"
        ) from error


def _with_rows(
    items: ItemTable, item_keys: list[str], features: FeatureMatrix, tokenizer: SemanticIdTokenizer
) -> ItemTable:
    living.check_shape(features.shape, len(item_keys), items.width)
    finite = torch.cat(list(RowBlocks(features, block_rows=_BLOCK_ROWS, item_keys=item_keys)))
    return items.with_rows(living.rows_of(item_keys, tokenizer.catalogue), finite)
