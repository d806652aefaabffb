"""A prepared dataset, a tokenizer and model sizes so small that a test trains and evaluates with them in seconds."""

import csv
from pathlib import Path
from typing import Any

import torch

from data.processed import DatasetConfig, RecDataset, TablesConfig, load_dataset
from modules.estimators import QuantizeMode
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer

NUM_ITEMS, NUM_USERS, NUM_COLD_TEST = 30, 40, 2
MODEL_SIZES = {
    "d_model": 16,
    "num_heads": 2,
    "head_dim": 8,
    "d_ff": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}


def write_interactions(path: Path) -> None:
    """Users walk through the items in steps of one; two users end at an item that nobody else has."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["user_id", "item_id", "timestamp"])
        for user in range(NUM_USERS):
            for place in range(6):
                table.writerow([f"u{user}", f"i{(user * 5 + place) % (NUM_ITEMS - NUM_COLD_TEST)}", place])
        for user in range(NUM_COLD_TEST):
            table.writerow([f"u{user}", f"i{NUM_ITEMS - 1 - user}", 9])


def walks(root: Path, log: Path, name: str = "walks") -> DatasetConfig:
    """Config of the dataset of that name below `root`, read from the interactions in `log`."""
    tables = TablesConfig(interactions=str(log), name=name)
    return DatasetConfig(dataset=RecDataset.TABLES, root=str(root), min_interactions=0, tables=tables)


def random_tokenizer(
    config: DatasetConfig, codebook_sizes: tuple[int, ...] = (4, 4), **settings: Any
) -> SemanticIdTokenizer:
    """Semantic ids of random features; settings are those of `SemanticIdTokenizer.fit`."""
    torch.manual_seed(0)
    dataset = load_dataset(config)
    mode = QuantizeMode.STRAIGHT_THROUGH
    rqvae = RqVae(RqVaeConfig(input_dim=4, embed_dim=2, hidden_dims=(), codebook_sizes=codebook_sizes, mode=mode))
    return SemanticIdTokenizer.fit(
        rqvae,
        torch.randn(NUM_ITEMS, 4),
        dataset.catalogue,
        feature_description={},
        dataset_manifest_hash=dataset.manifest_hash,
        **settings,
    )
