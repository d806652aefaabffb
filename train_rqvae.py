"""Items -> trained RQ-VAE -> frozen tokenizer artifact.

    python train_rqvae.py configs/demo/rqvae.gin                # offline, under a minute on a laptop CPU
    python train_rqvae.py configs/rqvae_amazon.gin              # Amazon Beauty with sentence-T5 features
    accelerate launch train_rqvae.py configs/rqvae_amazon.gin   # several GPUs

The artifact lies in SAVE_DIR_ROOT/model; train_decoder.py takes that path as its tokenizer.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import gin
import torch

from data.features import FeatureConfig
from data.files import json_sha256
from data.item_sets import ItemSet, joined_features, load_datasets, load_item_sets, training_rows
from data.processed import DatasetConfig, RecDataset
from data.schemas import InputError
from data.sources.tables import TablesConfig
from modules.estimators import QuantizeMode
from modules.quantize import Distance
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.plots import plot_run
from reports.tokenizer.report import write_tokenizer_report
from tasks.rqvae import RqVaeTask, SelectBy, TokenizerSettings, TrainOn, by_codes, initialize_
from training.cli import main
from training.gin_config import register
from training.loop import run_training
from training.loop_config import LoopConfig
from training.parameter_groups import ParameterGroup
from training.processes import on_main, process_state
from training.run_folder import RunFolder, RunOptions

register(DatasetConfig, TablesConfig, FeatureConfig, RqVaeConfig, LoopConfig, ParameterGroup)
register(RecDataset, QuantizeMode, Distance, CollisionPolicy)


@gin.configurable(module="train_rqvae", denylist=["options", "reuse_for"])
def train(
    *,
    options: RunOptions,
    save_dir_root: str,
    dataset: DatasetConfig,
    features: FeatureConfig,
    model: RqVaeConfig,
    loop: LoopConfig,
    more_datasets: tuple[DatasetConfig, ...] = (),
    train_on: TrainOn = "all",
    held_out: float = 0.0,
    select_by: SelectBy = "reconstruction",
    collisions: CollisionPolicy = CollisionPolicy.DEDUP_CODE,
    batch_size: int = 1024,
    neighbours_together: int = 1,
    pretrain_steps: int = 300,
    kmeans_rows: int = 20_000,
    kmeans_rounds: int = 0,
    temperature: tuple[float, float] = (0.3, 0.02),
    min_codebook_use: float = 0.2,
    max_evaluated_items: int = 200_000,
    seed: int = 0,
    wandb_logging: bool = False,
    tensorboard_logging: bool = False,
    reuse_for: str | None = None,
) -> Path:
    """Train an RQ-VAE on the items of data sets and freeze it as a tokenizer for each.

    With `RqVaeConfig.encoder = "identity"` nothing is trained by gradient: the codebooks come from residual k-means.

    Args:
        options: how the run was started.
        save_dir_root: run folder.
        dataset: where the items come from.
        features: what the RQ-VAE reads of them.
        model: its shape.
        loop: how to train.
        more_datasets: whose items it is trained on as well; their tokenizers get folders under more_models/.
        train_on: "seen" leaves out items that no training history contains, so that their ids are those of items that
            come later.
        held_out: share of the items to keep out of training and validate on.
        select_by: which weights to keep: those of the lowest reconstruction error or loss, over the items that are not
            trained on if there are any, or those with the fewest collisions.
        collisions: what becomes of items that share their codes.
        batch_size: items per process and step.
        neighbours_together: similar items that come into a batch together; `RqVaeConfig.separation_weight` needs some.
        pretrain_steps: steps of the autoencoder alone, before k-means sets the codebooks.
        kmeans_rows: items on which the codebooks are initialised.
        kmeans_rounds: in which k-means looks for better codebooks than its first; 15 pay where training begins with
            small errors already, as with `RqVaeConfig.encoder = "skip"`.
        temperature: of the Gumbel softmax at the first and the last step.
        min_codebook_use: share of its codes that every level must use; below it the run stops with an error.
        max_evaluated_items: items that an evaluation reads at most, drawn once.
        seed: of weights, k-means, batches and noise.
        wandb_logging: also log to W&B.
        tensorboard_logging: also log for TensorBoard.
        reuse_for: run folder of the training that needs the tokenizer: the artifact of a finished run with these
            settings is returned instead of training again.

    Returns:
        Folder of the tokenizer artifact of `dataset`.

    Raises:
        InputError: for bad input, a collapsed codebook, or a folder that holds another run.
    """
    settings = TokenizerSettings(
        batch_size=batch_size,
        neighbours_together=neighbours_together,
        pretrain_steps=pretrain_steps,
        kmeans_rows=kmeans_rows,
        kmeans_rounds=kmeans_rounds,
        temperature=temperature,
        min_codebook_use=min_codebook_use,
        train_on=train_on,
        held_out=held_out,
        select_by=select_by,
        max_evaluated_items=max_evaluated_items,
        collisions=collisions,
        seed=seed,
    )
    artifact = Path(save_dir_root) / "model"
    if reuse_for is not None and Path(reuse_for).resolve() == Path(save_dir_root).resolve():
        raise InputError(f"both stages have save_dir_root = {save_dir_root!r}. Give each a folder of its own.")
    finished = reuse_for is not None and (artifact / "manifest.json").is_file()
    datasets = [dataset, *more_datasets]
    prepared = load_datasets(datasets)
    if not finished:  # before the features are encoded, which may take long
        hashes = [one.manifest_hash for one in prepared]
        data_hash = hashes[0] if len(hashes) == 1 else json_sha256(hashes)
        run = RunFolder.open(save_dir_root, options, seed=seed, data_manifest_hash=data_hash)
    sets = load_item_sets(prepared, datasets, features)
    settings_hash = _hash_of(sets, [one.split for one in datasets], model, loop, settings)
    if finished:
        _check_settings_of(artifact, settings_hash)
        return artifact

    torch.manual_seed(seed)
    rqvae, values = RqVae(model), joined_features(sets)
    rows, valid_rows = training_rows(sets, seen_only=train_on == "seen", held_out=held_out, seed=seed)
    initialize_(rqvae, values, rows, settings)
    num_batches = loop.num_steps * loop.gradient_accumulation_steps
    rows = rows if neighbours_together == 1 else by_codes(rqvae, values, rows)
    item_keys = [key for items in sets for key in items.catalogue.item_keys]
    task = RqVaeTask(rqvae, values, rows, valid_rows, item_keys=item_keys, settings=settings, num_batches=num_batches)
    facts: dict[str, float] = {"steps": 0, "seconds": 0.0, "best_step": 0}
    if model.encoder != "identity":
        trackers = {"wandb_logging": wandb_logging, "tensorboard_logging": tensorboard_logging}
        result = run_training(task, loop, run, seed=seed, resume=options.resume, **trackers)
        facts = {"steps": result.steps, "seconds": round(result.seconds, 1), "best_step": result.best_step}
    else:
        run.accept_changes()

    with torch.no_grad():
        metrics = task.evaluate(rqvae.eval())
    provenance: dict[str, float | str] = {"settings_hash": settings_hash, "train_on": train_on, **facts}
    tokenizers = [_tokenizer(rqvae.cpu(), items, collisions, metrics, provenance) for items in sets]
    run.write_metrics(metrics | tokenizers[0].manifest["metrics"] | facts)
    on_main(lambda: _report(run, tokenizers[0], sets[0]))
    on_main(lambda: _save(run, tokenizers, sets))
    _announce(tokenizers[0], metrics, run)
    return run.model


def _hash_of(
    sets: Sequence[ItemSet],
    splits: Sequence[str],
    model: RqVaeConfig,
    loop: LoopConfig,
    settings: TokenizerSettings,
) -> str:
    """Of all that decides the artifacts; the default split is left out, so that earlier artifacts keep theirs."""
    decides = settings.train_on == "seen" and any(split != DatasetConfig.split for split in splits)
    return json_sha256(
        {
            "data": [items.prepared.manifest_hash for items in sets],
            "features": [items.features.description for items in sets],
            "model": model.to_dict(),
            "loop": loop.to_dict(),
            "training": {**asdict(settings), "collisions": settings.collisions.value},
            **({"splits": list(splits)} if decides else {}),
        }
    )


def _tokenizer(
    rqvae: RqVae,
    items: ItemSet,
    collisions: CollisionPolicy,
    metrics: dict[str, float],
    provenance: dict[str, float | str],
) -> SemanticIdTokenizer:
    """The tokenizer of one data set; what the metrics say of codebooks it measures itself, on all of its items."""
    losses = {name: value for name, value in metrics.items() if name.startswith("valid/")}
    return SemanticIdTokenizer.fit(
        rqvae,
        items.features.values,
        items.catalogue,
        feature_description=items.features.description,
        dataset_manifest_hash=items.prepared.manifest_hash,
        collisions=collisions,
        metrics=losses,
        provenance=provenance,
    )


def _save(run: RunFolder, tokenizers: Sequence[SemanticIdTokenizer], sets: Sequence[ItemSet]) -> None:
    for tokenizer, items in zip(tokenizers[1:], sets[1:], strict=True):
        tokenizer.save_pretrained(run.more_models / items.name)
    tokenizers[0].save_pretrained(run.model)  # last: a run that holds it is finished


def _report(run: RunFolder, tokenizer: SemanticIdTokenizer, items: ItemSet) -> None:
    metrics_log = run.metrics_log if run.metrics_log.is_file() else None  # none of k-means alone
    if metrics_log is not None:
        plot_run(metrics_log, run.report)
    write_tokenizer_report(run.report, tokenizer, items.features.values, metrics_log=metrics_log)


def _check_settings_of(artifact: Path, settings_hash: str) -> None:
    """InputError if the tokenizer there was trained with other settings."""
    provenance = SemanticIdTokenizer.from_pretrained(artifact).manifest.get("provenance", {})
    if provenance.get("settings_hash") != settings_hash:
        raise InputError(
            f"{artifact} holds a tokenizer that was trained with other data or settings. Set "
            "train_rqvae.train.save_dir_root to another folder, train it again with train_rqvae.py --overwrite, "
            "or name the tokenizer to use in train_decoder.train.tokenizer."
        )


def _announce(tokenizer: SemanticIdTokenizer, metrics: dict[str, float], run: RunFolder) -> None:
    if process_state().is_main_process:
        numbers = tokenizer.manifest["metrics"]
        print(
            f"tokenizer: {tokenizer.num_items:,} items, {numbers['codebook/unique_ratio']:.1%} distinct ids before "
            f"and {numbers['semantic_ids/unique_ratio']:.1%} after collisions were handled "
            f"({tokenizer.collision_policy.value}), reconstruction error {metrics['valid/reconstruction']:.4f}; "
            f"written to {run.model}, report in {run.report / 'index.html'}"
        )


if __name__ == "__main__":
    sys.exit(main(train, "train_rqvae"))
