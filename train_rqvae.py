"""Items -> trained RQ-VAE -> frozen tokenizer artifact.

    python train_rqvae.py configs/demo/rqvae.gin                # offline, under a minute on a laptop CPU
    python train_rqvae.py configs/rqvae_amazon.gin              # Amazon Beauty with sentence-T5 features
    accelerate launch train_rqvae.py configs/rqvae_amazon.gin   # several GPUs

The artifact lies in SAVE_DIR_ROOT/model; train_decoder.py takes that path as its tokenizer.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gin
import numpy as np
import torch
from torch import Tensor, nn

from data.batching import FeatureBatches, cold_items
from data.features import FeatureConfig, load_item_features
from data.files import json_sha256
from data.processed import DatasetConfig, PreparedDataset, RecDataset, load_dataset
from data.schemas import Catalogue, InputError
from data.sources.tables import TablesConfig
from evaluation.codebook import check_collapse, codebook_health
from modules.quantize import QuantizeMode
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.plots import plot_run
from training.checks import require_at_least
from training.cli import main
from training.gin_config import register
from training.loop import run_training
from training.loop_config import LoopConfig
from training.processes import on_main, process_state
from training.run_folder import RunFolder, RunOptions

register(DatasetConfig, TablesConfig, FeatureConfig, RqVaeConfig, LoopConfig, RecDataset, QuantizeMode)

_EVALUATION_ROWS = 4096


@dataclass(frozen=True, eq=False)
class RqVaeBatch:
    """What a step of the RQ-VAE needs on its device.

    Attributes:
        drawn: of `FeatureBatches.draw`.
        temperature: [] of the Gumbel softmax in this step; None in the other modes.
    """

    drawn: Tensor
    temperature: Tensor | None

    def __len__(self) -> int:
        return len(self.drawn)

    def to(self, device: torch.device) -> "RqVaeBatch":
        """The same batch on a device; copies do not wait for a GPU."""
        soon = device.type == "cuda"
        temperature = None if self.temperature is None else self.temperature.to(device, non_blocking=soon)
        return RqVaeBatch(self.drawn.to(device, non_blocking=soon), temperature)


class RqVaeTask:
    """What the training loop needs to know of an RQ-VAE.

    Args:
        model: the RQ-VAE, codebooks initialised.
        features: [N, D] item features, in memory or memory-mapped.
        batch_size: items per process and step.
        seed: fixes the order of items.
        temperature: of the Gumbel softmax at the first and the last batch, annealed geometrically between them.
        num_batches: length of the annealing.
        min_codebook_use: share of its codes that every level must use; below it the run stops.
    """

    selection_metric = "valid/reconstruction"
    higher_is_better = False

    def __init__(
        self,
        model: RqVae,
        features: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        temperature: tuple[float, float],
        num_batches: int,
        min_codebook_use: float,
    ) -> None:
        process = process_state()
        self.model: nn.Module = model
        self._config = model.config
        self._features = features
        self._batches = FeatureBatches(
            features,
            batch_size,
            seed,
            device=process.device,
            process_index=process.process_index,
            num_processes=process.num_processes,
        )
        self._temperature = temperature
        self._num_batches = num_batches
        self._min_codebook_use = min_codebook_use

    def batch(self, step: int) -> RqVaeBatch:
        """Items and temperature of a step."""
        if self._config.mode is not QuantizeMode.GUMBEL_SOFTMAX:
            return RqVaeBatch(self._batches.draw(step), None)
        first, last = self._temperature
        temperature = first * (last / first) ** min(step / self._num_batches, 1.0)
        return RqVaeBatch(self._batches.draw(step), torch.tensor(temperature))

    def loss(self, model: nn.Module, batch: RqVaeBatch) -> dict[str, Tensor]:
        """Loss of a batch and its parts."""
        temperature = 1.0 if batch.temperature is None else batch.temperature
        output = model(self._batches.pack(batch.drawn), temperature=temperature)
        return {"loss": output.loss, "reconstruction": output.reconstruction_loss, "quantize": output.quantize_loss}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and codebook health over all items.

        Raises:
            InputError: if a level uses fewer of its codes than min_codebook_use.
        """
        device = next(model.parameters()).device
        losses, codes = torch.zeros(3, dtype=torch.float64), []
        for start in range(0, len(self._features), _EVALUATION_ROWS):
            block = np.array(self._features[start : start + _EVALUATION_ROWS], dtype=np.float32)
            output = model(torch.from_numpy(block).to(device), temperature=self._temperature[1])
            parts = torch.stack([output.loss, output.reconstruction_loss, output.quantize_loss])
            losses += parts.double().cpu() * len(block)
            codes.append(output.codes.cpu())
        names = ("valid/loss", "valid/reconstruction", "valid/quantize")
        means = dict(zip(names, (losses / len(self._features)).tolist(), strict=True))
        health = codebook_health(torch.cat(codes), self._config.codebook_sizes)
        check_collapse(health, self._min_codebook_use)
        return means | health.as_metrics()


@gin.configurable(module="train_rqvae")
def train(
    *,
    options: RunOptions,
    save_dir_root: str,
    dataset: DatasetConfig,
    features: FeatureConfig,
    model: RqVaeConfig,
    loop: LoopConfig,
    batch_size: int = 1024,
    pretrain_steps: int = 300,
    kmeans_rows: int = 20_000,
    temperature: tuple[float, float] = (0.3, 0.02),
    min_codebook_use: float = 0.2,
    seed: int = 0,
    wandb_logging: bool = False,
    reuse_for: str | None = None,
) -> Path:
    """Train an RQ-VAE on the items of a data set and freeze it as a tokenizer.

    Args:
        options: how the run was started.
        save_dir_root: run folder.
        dataset: where the items come from.
        features: what the RQ-VAE reads of them.
        model: its shape.
        loop: how to train.
        batch_size: items per process and step.
        pretrain_steps: steps of the autoencoder alone, before k-means sets the codebooks.
        kmeans_rows: items on which the codebooks are initialised.
        temperature: of the Gumbel softmax at the first and the last step.
        min_codebook_use: share of its codes that every level must use; below it the run stops with an error.
        seed: of weights, k-means, batches and noise.
        wandb_logging: also log to W&B.
        reuse_for: run folder of the training that needs the tokenizer: the artifact of a finished run with these
            settings is returned instead of training again.

    Returns:
        Folder of the tokenizer artifact.

    Raises:
        InputError: for bad input, a collapsed codebook, or a folder that holds another run.
    """
    _check_settings(batch_size, pretrain_steps, kmeans_rows, temperature, min_codebook_use)
    artifact = Path(save_dir_root) / "model"
    if reuse_for is not None and Path(reuse_for).resolve() == Path(save_dir_root).resolve():
        raise InputError(f"both stages have save_dir_root = {save_dir_root!r}. Give each a folder of its own.")
    finished = reuse_for is not None and (artifact / "manifest.json").is_file()
    prepared = load_dataset(dataset)
    if not finished:  # before the features are encoded, which may take long
        run = RunFolder.open(save_dir_root, options, seed=seed, data_manifest_hash=prepared.manifest_hash)
    item_features = load_item_features(prepared, features)
    settings = json_sha256(
        {
            "data": prepared.manifest_hash,
            "features": item_features.description,
            "model": model.to_dict(),
            # Graphs change how a run computes, not what: artifacts of either kind are reused.
            "loop": {name: value for name, value in asdict(loop).items() if name != "cuda_graphs"},
            "training": [batch_size, pretrain_steps, kmeans_rows, temperature, seed],
        }
    )
    if finished:
        _check_settings_of(artifact, settings)
        return artifact

    torch.manual_seed(seed)
    rqvae = RqVae(model)
    first_rows = _sample_rows(item_features.values, kmeans_rows, seed)
    rqvae.fit_autoencoder_(first_rows, num_steps=pretrain_steps, batch_size=batch_size, seed=seed)
    rqvae.initialize_codebooks_(first_rows, seed=seed)
    task = RqVaeTask(
        rqvae,
        item_features.values,
        batch_size=batch_size,
        seed=seed,
        temperature=temperature,
        num_batches=loop.num_steps * loop.gradient_accumulation_steps,
        min_codebook_use=min_codebook_use,
    )
    result = run_training(task, loop, run, seed=seed, resume=options.resume, wandb_logging=wandb_logging)

    with torch.no_grad():
        metrics = task.evaluate(rqvae.eval())
    tokenizer = SemanticIdTokenizer.fit(
        rqvae.cpu(),
        item_features.values,
        _catalogue(prepared, dataset.split),
        feature_description=item_features.description,
        dataset_manifest_hash=prepared.manifest_hash,
        metrics=metrics,
        provenance={"settings_hash": settings, "steps": result.steps, "seconds": round(result.seconds, 1)},
    )
    run.write_metrics(metrics | {"best_step": result.best_step, "steps": result.steps, "seconds": result.seconds})
    on_main(lambda: plot_run(run.metrics_log, run.report))
    on_main(lambda: tokenizer.save_pretrained(run.model))  # last: a run that holds it is finished
    _announce(tokenizer, metrics, run)
    return run.model


def _check_settings(
    batch_size: int, pretrain_steps: int, kmeans_rows: int, temperature: tuple[float, float], min_codebook_use: float
) -> None:
    require_at_least(1, "train_rqvae.train", batch_size=batch_size, kmeans_rows=kmeans_rows)
    require_at_least(0, "train_rqvae.train", pretrain_steps=pretrain_steps)
    if not min(temperature) > 0:
        raise InputError(f"train_rqvae.train.temperature expected two positive numbers, got {temperature}.")
    if not 0 < min_codebook_use <= 1:
        raise InputError(f"train_rqvae.train.min_codebook_use expected a share in (0, 1], got {min_codebook_use}.")


def _sample_rows(features: np.ndarray, num_rows: int, seed: int) -> Tensor:
    """Up to num_rows distinct rows as float32; the same for the same seed."""
    rows = np.random.default_rng(seed).permutation(len(features))[:num_rows]
    return torch.from_numpy(np.asarray(features[np.sort(rows)], dtype=np.float32))


def _catalogue(prepared: PreparedDataset, split: str) -> Catalogue:
    """The data set's catalogue, with the items marked that no training range of the split contains."""
    catalogue = prepared.catalogue
    return replace(catalogue, cold=cold_items(prepared.histories, prepared.split(split), len(catalogue)))


def _check_settings_of(artifact: Path, settings: str) -> None:
    """InputError if the tokenizer there was trained with other settings."""
    provenance = SemanticIdTokenizer.from_pretrained(artifact).manifest.get("provenance", {})
    if provenance.get("settings_hash") != settings:
        raise InputError(
            f"{artifact} holds a tokenizer that was trained with other data or settings. Set "
            "train_rqvae.train.save_dir_root to another folder, train it again with train_rqvae.py --overwrite, "
            "or name the tokenizer to use in train_decoder.train.tokenizer."
        )


def _announce(tokenizer: SemanticIdTokenizer, metrics: dict[str, float], run: RunFolder) -> None:
    if process_state().is_main_process:
        print(
            f"tokenizer: {tokenizer.num_items:,} items, {metrics['codebook/unique_ratio']:.1%} distinct ids before "
            f"dedup, reconstruction error {metrics['valid/reconstruction']:.4f}; written to {run.model}"
        )


if __name__ == "__main__":
    sys.exit(main(train, "train_rqvae"))
