"""The shipped tasks trained by one or several processes, each on its share of every batch.

The data and the features are prepared first, as a training script does it: by one process while the others wait. The
main process writes the weights of every training; tests compare those of two processes, started by torchrun, with those
of one.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object

import data.features
import data.processed
from data.batching import ExampleStrategy, TrainingBatches
from data.features import FeatureConfig
from modules.estimators import QuantizeMode
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.sequential.sasrec import SASRecConfig
from modules.tokenizer.sequence import SequenceTokenizer
from tasks.retrieval import RetrievalTask
from tasks.rqvae import RqVaeTask, by_codes, initialize_
from tasks.sequence import SequenceTask
from tests.tiny_dataset import MODEL_SIZES, NUM_ITEMS, walks
from tests.training.tasks import QUANTIZERS, tokenizer_settings
from tests.training.tiny import loop_config
from training.loop import run_training
from training.parameter_groups import ParameterGroup
from training.processes import leave_together, on_main, process_state
from training.run_folder import RunFolder, RunOptions
from training.task import Task

BATCH_SIZE = 16
"""Of all processes together; neither 40 items nor the data set's examples are a multiple of it."""

NUM_STEPS = 8
TOKENIZERS = ("gumbel_softmax", "ema", "restarts", "sinkhorn", "separation")
"""Of QUANTIZERS: those whose processes do more together than to average their gradients, and a noisy one."""

FAR = 50.0
"""Where no row is, so that codes there are restarted."""

BROKEN_ROW = 7
"""Of the features of `ema`: the steps that draw it are skipped, whichever process it comes to."""


def retrieval_task(folder: Path) -> RetrievalTask:
    prepared = data.processed.load_dataset(walks(folder, folder / "interactions.csv"))
    torch.manual_seed(0)
    sizes = (4, 4, 4)
    model = EncoderDecoderRetrievalModel(RetrievalModelConfig(languages={"text": sizes}, dropout=0.0, **MODEL_SIZES))
    semantic_ids = torch.randint(4, (NUM_ITEMS, len(sizes)))
    batches = training_batches(prepared, ExampleStrategy.EVERY_PREFIX, max_history=8)
    tokenize = SequenceTokenizer(semantic_ids, model.vocabulary)
    return RetrievalTask(
        model,
        batches,
        tokenize=tokenize,
        item_keys=prepared.catalogue.item_keys,
        validate=lambda: {RetrievalTask.selection_metric: 0.5},
    )


def sequence_task(folder: Path) -> SequenceTask:
    """Of rows of one length: a mean over positions is otherwise not the mean of its parts' means."""
    prepared = data.processed.load_dataset(walks(folder, folder / "interactions.csv"))
    torch.manual_seed(0)
    model = SASRecConfig(num_items=NUM_ITEMS, d_model=16, d_ff=16, num_heads=2, max_history=3, dropout=0.0).build()
    return SequenceTask(
        model,
        training_batches(prepared, ExampleStrategy.LAST_ONLY, max_history=3),
        item_keys=prepared.catalogue.item_keys,
        validate=lambda: {"sasrec/valid/all/ndcg@10": 0.5},
        selection_metric="sasrec/valid/all/ndcg@10",
    )


def training_batches(
    prepared: data.processed.PreparedDataset, strategy: ExampleStrategy, *, max_history: int
) -> TrainingBatches:
    """This process's share of every batch."""
    process = process_state()
    return TrainingBatches(
        prepared.histories,
        prepared.split("leave_one_out").train,
        strategy=strategy,
        max_history=max_history,
        batch_size=BATCH_SIZE // process.num_processes,
        seed=0,
        process_index=process.process_index,
        num_processes=process.num_processes,
    )


def rqvae_task(name: str) -> RqVaeTask:
    torch.manual_seed(0)
    features, rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32), np.arange(40)
    quantizer = {"mode": QuantizeMode.STRAIGHT_THROUGH, **QUANTIZERS[name]}
    model = RqVae(RqVaeConfig(input_dim=8, hidden_dims=(8,), embed_dim=4, codebook_sizes=(8, 4), **quantizer))
    neighbours = 2 if name == "separation" else 1
    batch_size = BATCH_SIZE // process_state().num_processes
    settings = tokenizer_settings(batch_size=batch_size, pretrain_steps=5, neighbours_together=neighbours)
    initialize_(model, features, rows, settings)
    if model.config.levels[0].restart_after > 0:
        codes = model.quantizers[0].weight.detach().clone()
        codes[4:] += FAR
        model.quantizers[0].set_codes_(codes)
    rows = rows if neighbours == 1 else by_codes(model, features, rows)
    valid_rows = rows
    if name == "ema":
        features[BROKEN_ROW] = np.nan
        valid_rows = np.delete(rows, BROKEN_ROW)
    item_keys = [str(row) for row in range(len(features))]
    return RqVaeTask(model, features, rows, valid_rows, item_keys=item_keys, settings=settings, num_batches=NUM_STEPS)


def trained(name: str, task: Task, folder: Path, **changes: object) -> None:
    """Weights and buffers that all processes hold, written by the main one; an error where they differ."""
    run = RunFolder.open(folder / name, RunOptions(), seed=3)
    settings = {"num_steps": NUM_STEPS, "eval_every": NUM_STEPS, "checkpoint_every": NUM_STEPS, "log_every": 4}
    run_training(task, loop_config(**(settings | changes)), run, seed=3)
    state = task.model.state_dict()
    for held in gather_object([state]):
        torch.testing.assert_close(held, state, rtol=0, atol=0)
    on_main(lambda: torch.save(state, run.root / "weights.pt"))


def prepare(folder: Path) -> None:
    """Data and features of the interactions in a folder; an error where more than one process has made them."""
    made = []

    def counted(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (made.append(make.__name__), make(*arguments))[1]

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((data.processed, "_prepare"), (data.features, "_encode")):
            patch.setattr(module, name, counted(getattr(module, name)))
        prepared = data.processed.load_dataset(walks(folder, folder / "interactions.csv"))
        data.features.load_item_features(prepared, FeatureConfig(encoder="file", path=str(folder / "features.npy")))
    assert sorted(gather_object(made)) == ["_encode", "_prepare"]


def train_all(folder: Path) -> None:
    """Prepare, and train every task in a folder of its own below this one."""
    process_state()  # before whatever asks Accelerate, which would believe each process to be alone
    prepare(folder)
    trained("retrieval", retrieval_task(folder), folder)
    trained("sequence", sequence_task(folder), folder)
    frozen = ParameterGroup(parameters=("*embed*",), learning_rate_factor=0.0)
    settings = {"gradient_accumulation_steps": 2, "average_decay": 0.9, "parameter_groups": (frozen,)}
    trained("accumulated", retrieval_task(folder), folder, **settings)
    for name in TOKENIZERS:
        trained(name, rqvae_task(name), folder)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
    leave_together()
