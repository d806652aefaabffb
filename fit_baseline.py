"""Histories -> counted baseline (popularity, random, ItemKNN, UserKNN) and its artifact; nothing is trained.

    python fit_baseline.py configs/demo/item_knn.gin         # offline, seconds
    python fit_baseline.py configs/user_knn_beauty.gin --gin.DatasetConfig.raw_dir=FOLDER
    python fit_baseline.py configs/item_knn_ml_1m.gin --gin.ItemKNNConfig.decay=1.0 --gin.train.save_dir_root=FOLDER

The artifact lies in SAVE_DIR_ROOT/model; evaluate.py and recommend.py take that path.
"""

import sys
from dataclasses import replace
from pathlib import Path

import gin

from data.processed import DatasetConfig, RecDataset, TablesConfig, load_dataset
from data.schemas import InputError
from modules.artifact import save_model_artifact
from modules.baselines.counted import CountedConfig, CountedRanker
from modules.baselines.item_knn import ItemKNNConfig, ItemKNNRanker
from modules.baselines.popularity import PopularityConfig, PopularityRanker
from modules.baselines.random import RandomConfig, RandomRanker
from modules.baselines.user_knn import UserKNNConfig, UserKNNRanker
from tasks.outcome import finish, origin_of
from tasks.protocol import EvaluationProtocol, run_processes
from training.checks import require_at_least
from training.cli import main
from training.gin_config import register
from training.processes import on_main
from training.run_folder import RunFolder, RunOptions

RANKERS: dict[type[CountedConfig], type[CountedRanker]] = {
    PopularityConfig: PopularityRanker,
    RandomConfig: RandomRanker,
    ItemKNNConfig: ItemKNNRanker,
    UserKNNConfig: UserKNNRanker,
}

register(DatasetConfig, TablesConfig, *RANKERS)
register(RecDataset)


@gin.configurable(module="fit_baseline", denylist=["options"])
def train(
    *,
    options: RunOptions,
    save_dir_root: str,
    dataset: DatasetConfig,
    model: CountedConfig,
    max_history: int = 20,
    batch_size: int = 256,
    exclude_seen: bool | None = None,
    seed: int = 0,
) -> Path:
    """Count a baseline on the training histories of a data set.

    Args:
        options: how the run was started.
        save_dir_root: run folder.
        dataset: where the histories come from.
        model: kind and settings; its sizes are those of the data.
        max_history: items that the ranker reads of a history, the last ones.
        batch_size: histories ranked at once.
        exclude_seen: evaluate every ranker without the items of the history; None does where no training history
            repeats an item.
        seed: of the random baseline; the others draw nothing.

    Returns:
        Folder of the model artifact. A trial ends there: it reads no test targets.

    Raises:
        InputError: for bad input, or a folder that holds another run.
    """
    require_at_least(1, "fit_baseline.train", max_history=max_history, batch_size=batch_size)
    if options.profile is not None:
        raise InputError("--profile measures training steps, and a counted baseline has none. Leave it out.")
    _check_left_out(model)
    prepared = load_dataset(dataset)
    run = RunFolder.open(save_dir_root, options, seed=seed, data_manifest_hash=prepared.manifest_hash)
    protocol = EvaluationProtocol.of(prepared, dataset.split, max_history=max_history, exclude_seen=exclude_seen)

    if isinstance(model, RandomConfig):
        model = replace(model, seed=seed)
    catalogue = replace(prepared.catalogue, cold=protocol.cold)
    ranker = RANKERS[type(model)].fit(prepared.histories, protocol.split.train, len(catalogue), model)
    settings = {"max_history": max_history, "batch_size": batch_size}
    ranker = ranker.with_settings(**settings)
    run.accept_changes()

    origin = origin_of(run, dataset, protocol)
    name = ranker.name
    on_main(lambda: save_model_artifact(run.model, ranker, catalogue, origin, ranker_settings=settings, system=name))
    if options.is_trial:
        return run.model
    finish(run, protocol, [ranker], run_processes())
    return run.model


def _check_left_out(model: CountedConfig) -> None:
    given = [f"{name} = {getattr(model, name)}" for name in model.filled if getattr(model, name)]
    if given:
        raise InputError(
            f"{type(model).__name__}: {', '.join(given)} is filled in, sizes by what the data hold and a seed by "
            "fit_baseline.train.seed. Leave it out of the config."
        )


if __name__ == "__main__":
    sys.exit(main(train, "fit_baseline"))
