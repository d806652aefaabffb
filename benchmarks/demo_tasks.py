"""The tasks that `make demo` trains, of the same sizes, over random histories, codes and features."""

import numpy as np
import torch
from torch import nn

from data.batching import ExampleStrategy, TrainingBatches
from data.schemas import Histories, Ranges
from modules.estimators import QuantizeMode
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.sequence import SequenceTokenizer
from tasks.retrieval import RetrievalTask
from tasks.rqvae import RqVaeTask, TokenizerSettings
from training.processes import process_state

NUM_ITEMS, NUM_USERS = 1000, 3000
LEVEL_SIZES = (128, 64, 64, 8)
BATCH_SIZE = 256
MAX_HISTORY = 10
FEATURE_WIDTH = 128

_ITEM_KEYS = [f"item {number}" for number in range(NUM_ITEMS)]


class UnmeasuredRqVaeTask(RqVaeTask):
    """Its evaluation measures nothing, so that what surrounds an evaluation can be timed."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """A number to select by."""
        return {self.selection_metric: 0.0}


def decoder_config(level_sizes: tuple[int, ...], *, dropout: float = 0.1) -> RetrievalModelConfig:
    """The sizes of configs/demo/decoder.gin."""
    return RetrievalModelConfig(
        languages={"text": level_sizes},
        d_model=64,
        num_heads=2,
        head_dim=32,
        d_ff=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_user_buckets=0,
        dropout=dropout,
    )


def decoder_task(*, batch_size: int = BATCH_SIZE, dropout: float = 0.1) -> RetrievalTask:
    """The retrieval model of configs/demo/decoder.gin; its evaluation measures nothing."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model = EncoderDecoderRetrievalModel(decoder_config(LEVEL_SIZES, dropout=dropout))
    process = process_state()
    codes = np.stack([generator.integers(size, size=NUM_ITEMS) for size in LEVEL_SIZES], axis=1)
    histories, ranges = _histories(generator)
    batches = TrainingBatches(
        histories,
        ranges,
        strategy=ExampleStrategy.EVERY_PREFIX,
        max_history=MAX_HISTORY,
        batch_size=batch_size,
        seed=0,
        device=process.device,
        process_index=process.process_index,
        num_processes=process.num_processes,
    )
    return RetrievalTask(
        model,
        batches,
        tokenize=SequenceTokenizer(torch.from_numpy(codes), model.vocabulary),
        item_keys=_ITEM_KEYS,
        validate=lambda: {RetrievalTask.selection_metric: 0.0},
    )


def rqvae_task(*, batch_size: int = BATCH_SIZE) -> UnmeasuredRqVaeTask:
    """The RQ-VAE of configs/demo/rqvae.gin, codebooks set by k-means; its evaluation measures nothing."""
    torch.manual_seed(0)
    config = RqVaeConfig(
        input_dim=FEATURE_WIDTH,
        hidden_dims=(256, 128),
        embed_dim=32,
        codebook_sizes=(128, 64, 64),
        mode=QuantizeMode.ROTATION_TRICK,
        codebook_normalize=True,
    )
    settings = TokenizerSettings(
        batch_size=batch_size,
        pretrain_steps=0,
        kmeans_rows=NUM_ITEMS,
        kmeans_rounds=0,
        temperature=(0.3, 0.02),
        min_codebook_use=0.01,
        train_on="all",
        held_out=0.0,
        select_by="reconstruction",
        neighbours_together=1,
        max_evaluated_items=NUM_ITEMS,
        collisions=CollisionPolicy.DEDUP_CODE,
        seed=0,
    )
    features = np.random.default_rng(0).standard_normal((NUM_ITEMS, FEATURE_WIDTH)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rows, model = np.arange(NUM_ITEMS), RqVae(config)
    model.initialize_codebooks_(torch.from_numpy(features), seed=0)
    return UnmeasuredRqVaeTask(
        model, features, rows, rows, item_keys=_ITEM_KEYS, settings=settings, num_batches=1
    )  # the rotation trick has no temperature


def _histories(generator: np.random.Generator) -> tuple[Histories, Ranges]:
    """Histories of ten items on average, and their training ranges without the last two."""
    lengths = (4 + generator.geometric(0.165, size=NUM_USERS)).clip(max=40)
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    num_items = int(offsets[-1])
    histories = Histories(
        offsets=offsets,
        item_ids=torch.from_numpy(generator.integers(NUM_ITEMS, size=num_items).astype(np.int32)),
        timestamps=torch.arange(num_items),
        user_hashes=torch.arange(NUM_USERS),
    )
    rows = torch.arange(NUM_USERS, dtype=torch.int32)
    return histories, Ranges(rows, torch.zeros_like(rows), torch.from_numpy(lengths.astype(np.int32) - 3))
