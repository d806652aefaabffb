"""The shipped tasks in small, and their steps without the loop around them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tasks.rqvae
from data.batching import ExampleStrategy, TrainingBatches
from data.schemas import Histories, Ranges
from modules.estimators import QuantizeMode
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.quantize import Distance
from modules.rqvae import RqVae, RqVaeConfig
from modules.sequential.sasrec import SASRecConfig
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.sequence import SequenceTokenizer
from tasks.retrieval import RetrievalTask
from tasks.rqvae import RqVaeTask, TokenizerSettings
from tasks.sequence import SequenceTask
from tests.training.tiny import loop_config
from training.optimizers import build_optimizer
from training.step import OptimizerStep
from training.task import Task

RATE = 2**-8
"""The same number in fp32, in which a recorded rate is held."""

CPU = torch.device("cpu")


def optimizer_step(task: Task, accelerator: Any, *, recorded: bool) -> OptimizerStep:
    """A step at a constant rate; `accelerator` has device, autocast and scaler."""
    config = loop_config(learning_rate=RATE)
    task.model.to(accelerator.device).train()
    optimizer = build_optimizer(task.model, config, recorded=recorded)
    return OptimizerStep(task, task.model, optimizer, accelerator=accelerator, config=config, recorded=recorded)


def train(task: Task, accelerator: Any, *, recorded: bool, num_steps: int) -> Tensor:
    """[steps, numbers] that are logged; the model is trained in place."""
    step = optimizer_step(task, accelerator, recorded=recorded)
    torch.manual_seed(5)
    return torch.stack([step([task.batch(index)]).values.clone() for index in range(num_steps)])


def retrieval_task(
    *, fixed_capacity: bool, dropout: float = 0.1, device: torch.device = CPU, items: ItemTable | None = None
) -> RetrievalTask:
    """Fifty users, thirty items, one layer; batches of 32; with items LIGER, else TIGER."""
    torch.manual_seed(0)
    sizes = (8, 8, 4)
    config = RetrievalModelConfig(
        languages={"text": sizes},
        d_model=16,
        num_heads=2,
        head_dim=8,
        d_ff=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_user_buckets=5,
        dropout=dropout,
    )
    if items is not None:
        item_input = ItemInputConfig(
            num_features=items.width, hidden_dims=(12,), projection_dropout=dropout, input_dropout=dropout
        )
        config = replace(config, items=item_input, embedding_loss_weight=1.0)
    model = EncoderDecoderRetrievalModel(config)
    batches = training_batches(ExampleStrategy.EVERY_PREFIX, fixed_capacity, device)
    semantic_ids = torch.stack([torch.randint(size, (30,)) for size in sizes], dim=1)
    tokenize = SequenceTokenizer(semantic_ids, model.vocabulary)
    return RetrievalTask(
        model,
        batches,
        tokenize=tokenize,
        item_keys=[f"item-{item_id}" for item_id in range(30)],
        validate=dict,
        items=items,
    )


def liger_task(**settings: Any) -> RetrievalTask:
    """A retrieval task with a dense head over features, which three items lack."""
    missing = torch.arange(30) % 10 == 0
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).masked_fill(missing[:, None], 0.0)
    return retrieval_task(**settings, items=ItemTable(features, missing, torch.zeros_like(missing)))


def sequence_task(*, fixed_capacity: bool, dropout: float = 0.1, device: torch.device = CPU) -> SequenceTask:
    """The same data and two layers; batches of 32 whole histories."""
    torch.manual_seed(0)
    config = SASRecConfig(num_items=30, d_model=16, d_ff=16, num_heads=2, max_history=8, dropout=dropout)
    model = config.build()
    batches = training_batches(ExampleStrategy.LAST_ONLY, fixed_capacity, device)
    item_keys = [f"item-{item_id}" for item_id in range(30)]
    return SequenceTask(model, batches, item_keys=item_keys, validate=dict, selection_metric="sasrec/valid/all/ndcg@10")


def training_batches(strategy: ExampleStrategy, fixed_capacity: bool, device: torch.device) -> TrainingBatches:
    """Of random histories; draws from torch's generator."""
    lengths = torch.randint(2, 12, (50,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    num_items = int(offsets[-1])
    histories = Histories(
        offsets, torch.randint(30, (num_items,), dtype=torch.int32), torch.arange(num_items), torch.arange(50)
    )
    rows = torch.arange(50, dtype=torch.int32)
    return TrainingBatches(
        histories,
        Ranges(rows, torch.zeros_like(rows), (lengths - 1).int()),
        strategy=strategy,
        max_history=8,
        batch_size=32,
        seed=0,
        device=device,
        fixed_capacity=fixed_capacity,
    )


def tokenizer_settings(**changes: Any) -> TokenizerSettings:
    """Settings of `train_rqvae.train`, small where they are sizes."""
    settings: dict[str, Any] = {
        "batch_size": 16,
        "pretrain_steps": 0,
        "kmeans_rows": 100,
        "kmeans_rounds": 0,
        "temperature": (2.0, 0.05),
        "min_codebook_use": 0.1,
        "train_on": "all",
        "held_out": 0.0,
        "select_by": "reconstruction",
        "neighbours_together": 1,
        "max_evaluated_items": 1000,
        "collisions": CollisionPolicy.DEDUP_CODE,
        "seed": 0,
    }
    return TokenizerSettings(**{**settings, **changes})


QUANTIZERS: dict[str, dict[str, Any]] = {
    **{mode.value: {"mode": mode} for mode in QuantizeMode},
    "sim_vq": {"sim_vq": True},
    "ema": {"ema_decay": 0.9, "restart_after": 2},
    "restarts": {"restart_after": 2, "mode": QuantizeMode.ROTATION_TRICK},
    "sinkhorn": {"sinkhorn_epsilon": (0.0, 0.01)},
    "cosine": {"distance": Distance.COSINE},
    "soft cosine": {"distance": Distance.COSINE, "mode": QuantizeMode.GUMBEL_SOFTMAX},
    "separation": {"separation_weight": 1.0},
    "mixed": {"mode": (QuantizeMode.GUMBEL_SOFTMAX, QuantizeMode.ROTATION_TRICK), "ema_decay": (0.0, 0.9)},
}
"""Settings of RqVaeConfig that each train in another way."""


def rqvae_task(quantizer: str, *, num_batches: int, device: torch.device = CPU) -> RqVaeTask:
    """Forty items of eight features; batches of 16; quantizer is one of QUANTIZERS."""
    torch.manual_seed(0)
    settings = {"mode": QuantizeMode.STRAIGHT_THROUGH, **QUANTIZERS[quantizer]}
    config = RqVaeConfig(input_dim=8, hidden_dims=(8,), embed_dim=4, codebook_sizes=(6, 6), **settings)
    alone = SimpleNamespace(device=device, process_index=0, num_processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.rqvae, "process_state", lambda: alone)
        return RqVaeTask(
            RqVae(config),
            np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32),
            np.arange(40),
            np.arange(40),
            item_keys=[f"item-{row}" for row in range(40)],
            settings=tokenizer_settings(),
            num_batches=num_batches,
        )
