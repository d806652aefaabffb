"""Histories -> trained model of item sequences (SASRec, HSTU) and its artifact.

    python train_sequence.py configs/sasrec_ml_1m.gin               # downloads MovieLens 1M
    python train_sequence.py configs/sasrec_beauty.gin --gin.train.save_dir_root=FOLDER --gin.train.seed=1
    accelerate launch train_sequence.py configs/sasrec_beauty.gin   # several GPUs

The artifact lies in SAVE_DIR_ROOT/model; evaluate.py and recommend.py take that path.
"""

import sys
from dataclasses import replace
from pathlib import Path

import gin
import torch

from data.batching import ExampleStrategy
from data.processed import DatasetConfig, RecDataset, TablesConfig, load_dataset
from data.schemas import InputError
from modules.artifact import save_model_artifact
from modules.dense.vector_ranker import SequenceRanker
from modules.sequential.hstu import HSTUConfig
from modules.sequential.next_item import NextItemConfig
from modules.sequential.sasrec import SASRecConfig
from tasks.outcome import finish, origin_of
from tasks.protocol import EvaluationProtocol, run_processes
from tasks.sequence import SequenceTask, training_batches
from training.checks import require_at_least
from training.cli import main
from training.gin_config import register
from training.loop import run_training
from training.loop_config import LoopConfig
from training.parameter_groups import ParameterGroup
from training.processes import on_main
from training.run_folder import RunFolder, RunOptions

register(DatasetConfig, TablesConfig, LoopConfig, ParameterGroup, HSTUConfig, SASRecConfig)
register(RecDataset, ExampleStrategy)


@gin.configurable(module="train_sequence", denylist=["options"])
def train(
    *,
    options: RunOptions,
    save_dir_root: str,
    dataset: DatasetConfig,
    model: NextItemConfig,
    loop: LoopConfig,
    batch_size: int = 256,
    strategy: ExampleStrategy = ExampleStrategy.LAST_ONLY,
    max_valid_users: int | None = None,
    exclude_seen: bool | None = None,
    seed: int = 0,
    wandb_logging: bool = False,
    tensorboard_logging: bool = False,
) -> Path:
    """Train a model of item sequences on the histories of a data set.

    Args:
        options: how the run was started.
        save_dir_root: run folder.
        dataset: where the histories come from.
        model: kind and sizes; its num_items is that of the data.
        loop: how to train.
        batch_size: histories per process and step.
        strategy: how training ranges become histories with a target. The model learns from every position of a
            history, so that LAST_ONLY has each range once, with its last max_history targets, in an epoch.
        max_valid_users: validate on that many users, drawn once; None takes all.
        exclude_seen: evaluate every ranker without the items of the history; None does where no training history
            repeats an item.
        seed: of weights, batches and dropout.
        wandb_logging: also log to W&B.
        tensorboard_logging: also log for TensorBoard.

    Returns:
        Folder of the model artifact. A trial ends there: it reads no test targets.

    Raises:
        InputError: for bad input, or a folder that holds another run.
    """
    require_at_least(1, "train_sequence.train", batch_size=batch_size, max_valid_users=max_valid_users)
    prepared = load_dataset(dataset)
    num_items = len(prepared.catalogue)
    _check_num_items(model, num_items, prepared.folder)
    run = RunFolder.open(save_dir_root, options, seed=seed, data_manifest_hash=prepared.manifest_hash)
    max_history = model.max_history
    protocol = EvaluationProtocol.of(prepared, dataset.split, max_history=max_history, exclude_seen=exclude_seen)

    torch.manual_seed(seed)
    sequence_model = replace(model, num_items=num_items).build()
    ranker = SequenceRanker(sequence_model)
    processes = run_processes()
    batches = training_batches(protocol, loop, strategy=strategy, batch_size=batch_size, seed=seed)
    task = SequenceTask(
        sequence_model,
        batches,
        item_keys=prepared.catalogue.item_keys,
        validate=lambda: protocol.evaluate(
            [ranker], "valid", max_users=max_valid_users, seed=seed, processes=processes
        ),
        selection_metric=f"{ranker.name}/valid/all/ndcg@10",
    )
    trackers = {"wandb_logging": wandb_logging, "tensorboard_logging": tensorboard_logging}
    result = run_training(task, loop, run, seed=seed, resume=options.resume, **trackers)

    catalogue = replace(prepared.catalogue, cold=protocol.cold)
    origin = origin_of(run, dataset, protocol, result)
    name = sequence_model.name
    on_main(lambda: save_model_artifact(run.model, sequence_model, catalogue, origin, ranker_settings={}, system=name))
    if options.is_trial:
        return run.model
    finish(run, protocol, [ranker], processes, training=result)
    return run.model


def _check_num_items(model: NextItemConfig, num_items: int, folder: Path) -> None:
    if model.num_items not in (0, num_items):
        raise InputError(
            f"{type(model).__name__}.num_items = {model.num_items:,} contradicts the {num_items:,} items of {folder}. "
            "Leave it out of the config: it is taken from the data."
        )


if __name__ == "__main__":
    sys.exit(main(train, "train_sequence"))
