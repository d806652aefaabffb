"""What a retrieval model is built from: sizes of the tokenizer's code language and of the item features."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.features import FeatureConfig, load_item_features
from data.processed import PreparedDataset
from data.schemas import InputError
from modules.item_table import ItemTable
from modules.model import RetrievalModelConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer


def load_item_table(
    prepared: PreparedDataset, features: FeatureConfig | None, cold: Tensor
) -> tuple[ItemTable, dict[str, Any]]:
    """Features of all items, for a model that reads them, and what describes their encoder.

    Args:
        prepared: whose items.
        features: what encodes them, on first use.
        cold: [N] bool, items that no training range of the model's split contains.

    Raises:
        InputError: if no features are named, or they cannot be had.
    """
    if features is None:
        raise InputError(
            "RetrievalModelConfig.items reads item features, but train_decoder.train.features names none. Set "
            "train_decoder.train.features = @FeatureConfig(), or leave RetrievalModelConfig.items unset."
        )
    loaded = load_item_features(prepared, features)
    values = torch.from_numpy(np.array(loaded.values))  # a copy: torch cannot hold the pages of a memory map
    return ItemTable(values, torch.from_numpy(np.array(loaded.missing)), cold), loaded.description


def sized(model: RetrievalModelConfig, tokenizer: SemanticIdTokenizer, items: ItemTable | None) -> RetrievalModelConfig:
    """The config with the tokenizer's language and, where it reads item features, their width.

    Raises:
        InputError: if the config states another width.
    """
    model = replace(model, languages={tokenizer.language: tokenizer.level_sizes})
    if model.items is None or items is None:
        return model
    if model.items.num_features not in (0, items.width):
        raise InputError(
            f"ItemInputConfig.num_features = {model.items.num_features}, but the item features are {items.width} wide. "
            "Leave it out: it follows the features."
        )
    return replace(model, items=replace(model.items, num_features=items.width))
