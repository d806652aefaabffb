"""Histories and a frozen tokenizer -> trained retrieval model artifact.

    python train_decoder.py configs/demo/decoder.gin               # offline, a minute or two on a laptop CPU
    python train_decoder.py configs/decoder_amazon.gin             # Amazon Beauty; trains its tokenizer first, once
    accelerate launch train_decoder.py configs/decoder_amazon.gin  # several GPUs

The artifact lies in SAVE_DIR_ROOT/model; evaluate.py and recommend.py take that path.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gin
import torch
from torch import Tensor

import train_rqvae
from data.batching import ExampleStrategy
from data.features import FeatureConfig, load_item_features
from data.files import json_sha256
from data.processed import DatasetConfig, PreparedDataset, load_dataset
from data.schemas import InputError
from modules.artifact import save_model_artifact
from modules.generation.beam import Normalize
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.retrieval_modes import make_rankers
from modules.tokenizer.legacy import is_legacy, load_legacy
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tasks.items import load_item_table, sized
from tasks.outcome import finish, origin_of
from tasks.protocol import EvaluationProtocol, run_processes
from tasks.retrieval import RetrievalTask
from tasks.sequence import training_batches
from training.checks import require_at_least
from training.cli import main
from training.gin_config import register
from training.loop import run_training
from training.loop_config import LoopConfig
from training.processes import on_main
from training.run_folder import RunFolder, RunOptions

register(RetrievalModelConfig, ItemInputConfig, ExampleStrategy)


@gin.configurable(module="train_decoder", denylist=["options"])
def train(
    *,
    options: RunOptions,
    save_dir_root: str,
    dataset: DatasetConfig,
    model: RetrievalModelConfig,
    loop: LoopConfig,
    tokenizer: str | None = None,
    features: FeatureConfig | None = None,
    batch_size: int = 256,
    max_history: int = 20,
    strategy: ExampleStrategy = ExampleStrategy.EVERY_PREFIX,
    beam_width: int = 20,
    normalize: Normalize = "level",
    modes: tuple[str, ...] = ("generative",),
    max_valid_users: int | None = None,
    exclude_seen: bool | None = None,
    seed: int = 0,
    wandb_logging: bool = False,
    tensorboard_logging: bool = False,
) -> Path:
    """Train a retrieval model on the histories of a data set.

    Args:
        options: how the run was started.
        save_dir_root: run folder.
        dataset: where the histories come from.
        model: sizes; its languages are those of the tokenizer.
        loop: how to train.
        tokenizer: artifact folder, Hub id, or an RQ-VAE of the older layout (which needs `features`); None trains one
            with the RQ-VAE config that this config includes, or takes it from that run's folder. One that was trained
            without cold items must have been without those of this data set's split.
        features: item features, for a model that reads them (`RetrievalModelConfig.items`) and for an RQ-VAE of the
            older layout.
        batch_size: examples per process and step.
        max_history: items that the model reads of a history, the last ones.
        strategy: how training ranges become examples.
        beam_width: prefixes kept per step of generation.
        modes: ways to retrieve that are evaluated, see `modules.retrieval_modes`: "generative", and of a model with a
            dense head "dense" and "hybrid@K". The first one is validated while training, chooses the best weights and
            is what the artifact does when nothing else is asked for.
        normalize: what scores are probabilities among, see `modules.generation.beam.beam_search`.
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
    counts = {"batch_size": batch_size, "max_history": max_history, "beam_width": beam_width}
    require_at_least(1, "train_decoder.train", **counts, max_valid_users=max_valid_users)
    if not modes:
        raise InputError('train_decoder.train.modes expected at least one way to retrieve, such as ("generative",).')
    prepared = load_dataset(dataset)
    run = RunFolder.open(save_dir_root, options, seed=seed, data_manifest_hash=prepared.manifest_hash)
    protocol = EvaluationProtocol.of(prepared, dataset.split, max_history=max_history, exclude_seen=exclude_seen)
    semantic_ids = load_tokenizer(tokenizer, prepared, features, options, save_dir_root)
    _check_trained_without(semantic_ids, protocol.cold, dataset.split)
    run.require_same(tokenizer=semantic_ids.content_hash)

    items, encoder = None, None
    if model.items is not None:
        items, encoder = load_item_table(prepared, features, protocol.cold)
        run.require_same(item_features=json_sha256(encoder))

    torch.manual_seed(seed)
    retrieval_model = EncoderDecoderRetrievalModel(sized(model, semantic_ids, items))
    if items is not None:
        retrieval_model.fit_features_(items)
    settings: dict[str, Any] = {"beam_width": beam_width, "max_history": max_history, "normalize": normalize}
    rankers = make_rankers(retrieval_model, semantic_ids, items, modes=modes, **settings)
    processes = run_processes()
    batches = training_batches(protocol, loop, strategy=strategy, batch_size=batch_size, seed=seed)
    tokenize = SequenceTokenizer(semantic_ids.semantic_ids, retrieval_model.vocabulary, language=semantic_ids.language)
    task = RetrievalTask(
        retrieval_model,
        batches,
        tokenize=tokenize,
        items=items,
        item_keys=prepared.catalogue.item_keys,
        validate=lambda: protocol.evaluate(
            rankers[:1], "valid", max_users=max_valid_users, seed=seed, processes=processes
        ),
        selection_metric=f"{rankers[0].name}/valid/all/ndcg@10",
    )
    trackers = {"wandb_logging": wandb_logging, "tensorboard_logging": tensorboard_logging}
    result = run_training(task, loop, run, seed=seed, resume=options.resume, **trackers)

    origin = origin_of(run, dataset, protocol, result) | {"item_features": encoder}
    settings["mode"] = modes[0]
    on_main(
        lambda: save_model_artifact(
            run.model, retrieval_model, semantic_ids, origin, ranker_settings=settings, items=items
        )
    )
    if options.is_trial:
        return run.model
    finish(run, protocol, rankers, processes, training=result)
    return run.model


def load_tokenizer(
    path: str | None, prepared: PreparedDataset, features: FeatureConfig | None, options: RunOptions, reuse_for: str
) -> SemanticIdTokenizer:
    """The tokenizer at a path or Hub id, or of the included RQ-VAE config, checked against the data set.

    Raises:
        InputError: if there is none, or its items are not those of the data set.
    """
    if path is None:
        stage = options.of("train_rqvae")
        going_on = stage if stage.is_trial else replace(stage, resume="auto", overwrite=False)
        tokenizer = SemanticIdTokenizer.from_pretrained(train_rqvae.train(options=going_on, reuse_for=reuse_for))
    elif is_legacy(path):
        tokenizer = _tokenizer_of_legacy(path, prepared, features)
    else:
        tokenizer = SemanticIdTokenizer.from_pretrained(path)
    if tokenizer.catalogue.item_keys != prepared.catalogue.item_keys:
        raise InputError(
            f"the tokenizer {path or 'of the included RQ-VAE config'} knows {tokenizer.num_items:,} items that are not "
            f"the {len(prepared.catalogue):,} of {prepared.folder}, in that order. Train a tokenizer on this data set."
        )
    return tokenizer


def _check_trained_without(tokenizer: SemanticIdTokenizer, cold: Tensor, split: str) -> None:
    """InputError if a tokenizer was trained without cold items, but those of another split."""
    seen_only = tokenizer.manifest.get("provenance", {}).get("train_on") == "seen"
    left_out = tokenizer.catalogue.cold
    if seen_only and (left_out is None or not torch.equal(left_out, cold)):
        raise InputError(
            "the tokenizer was trained without cold items (train_on = 'seen'), but not without those of the split "
            f"{split!r}: it may have seen items that are cold here. Train one with DatasetConfig.split = {split!r}"
            " into a folder of its own, or with train_rqvae.train.train_on = 'all'."
        )


def _tokenizer_of_legacy(path: str, prepared: PreparedDataset, features: FeatureConfig | None) -> SemanticIdTokenizer:
    if features is None:
        raise InputError(
            f"{path} is an RQ-VAE of the older layout, which has weights but no semantic ids. Set "
            "train_decoder.train.features to the item features that it was trained on."
        )
    item_features = load_item_features(prepared, features)
    return SemanticIdTokenizer.fit(
        load_legacy(path),
        item_features.values,
        prepared.catalogue,
        feature_description=item_features.description,
        dataset_manifest_hash=prepared.manifest_hash,
    )


if __name__ == "__main__":
    sys.exit(main(train, "train_decoder"))
