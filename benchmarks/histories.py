"""Batches with the lengths of real histories; items and codes are random."""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from data.batching import ExampleStrategy, TrainingBatches
from data.schemas import Histories, InputError, Ranges, TokenizedSeqBatch, read_safetensors
from modules.model import RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer

MAX_HISTORY = 20
LEVEL_SIZES = (256, 256, 256, 256)
NUM_ITEMS = 12101


def add_lengths_argument(parser: argparse.ArgumentParser) -> None:
    """Where the lengths of histories come from."""
    parser.add_argument(
        "--lengths", type=Path, metavar="FOLDER", help="with a prepared data set, or the raw sequential_data.txt"
    )


def read_lengths(folder: Path | None) -> tuple[np.ndarray, str]:
    """Items per user, and where they come from: a prepared data set in or below the folder, or P5's raw file.

    Raises:
        InputError: if the folder has neither.
    """
    root = os.environ.get("REC_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    prepared = [] if folder is None else sorted(folder.rglob("histories.safetensors"))
    if prepared:
        offsets = read_safetensors(prepared[0])["offsets"]
        return offsets.diff().long().numpy(), prepared[0].parent.name
    file = (folder or Path(root, "amazon_p5", "beauty")) / "sequential_data.txt"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return np.array([len(line.split()) - 1 for line in lines if line.strip()]), "amazon-beauty"
    if folder is not None:
        raise InputError(f"{folder} has no histories. Give --lengths a prepared data set or raw sequential_data.txt.")
    return 4 + np.random.default_rng(0).geometric(1 / 4.9, size=22363), "SYNTHETIC lengths (no real data found)"


def build_batches(
    lengths: np.ndarray, batch_size: int, *, device: str = "cpu", fixed_capacity: bool = False
) -> TrainingBatches:
    """Every prefix of each history without its last two items, over random items."""
    generator = torch.Generator().manual_seed(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_users, num_interactions = len(lengths), int(offsets[-1])
    histories = Histories(
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        item_ids=torch.randint(NUM_ITEMS, (num_interactions,), generator=generator, dtype=torch.int32),
        timestamps=torch.arange(num_interactions),
        user_hashes=torch.randint(1 << 62, (num_users,), generator=generator),
    )
    rows = torch.arange(num_users, dtype=torch.int32)
    ends = torch.from_numpy(lengths.astype(np.int32) - 3).clamp_(min=0)
    ranges = Ranges(rows=rows, begins=torch.zeros_like(rows), ends=ends)
    return TrainingBatches(
        histories,
        ranges,
        strategy=ExampleStrategy.EVERY_PREFIX,
        max_history=MAX_HISTORY,
        batch_size=batch_size,
        seed=0,
        device=torch.device(device),
        fixed_capacity=fixed_capacity,
    )


def build_tokenizer(config: RetrievalModelConfig, device: str = "cpu") -> SequenceTokenizer:
    """Random codes for all items, the same every time."""
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(size, (NUM_ITEMS,), generator=generator) for size in LEVEL_SIZES]
    return SequenceTokenizer(torch.stack(columns, dim=1), config.vocabulary()).to(device)


def typical_batch(folder: Path | None, batch_size: int, device: str) -> tuple[TokenizedSeqBatch, str]:
    """The first training batch, tokenized, and a description of it."""
    lengths, source = read_lengths(folder)
    config = RetrievalModelConfig(languages={"text": LEVEL_SIZES})
    batch = build_tokenizer(config, device)(build_batches(lengths, batch_size, device=device).batch(0))
    return batch, f"{source}, batch {batch_size}, {len(batch.tokens):,} tokens"
