"""Training an RQ-VAE: what a step reads, what it loses, and how codebooks are judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from data.batching import FeatureBatches
from data.joined_rows import ChosenRows, RowMatrix
from data.schemas import InputError
from evaluation.codebook import check_collapse, codebook_health
from modules.residual_kmeans import residual_kmeans
from modules.rqvae import RqVae
from modules.tokenizer.assign import assign_codes
from modules.tokenizer.policies import CollisionPolicy
from tasks.protocol import run_processes
from training.checks import require_at_least
from training.processes import process_state

_EVALUATION_ROWS = 4096

TrainOn = Literal["all", "seen"]
SelectBy = Literal["reconstruction", "loss", "collisions"]

_SELECTION = {
    "reconstruction": ("valid/reconstruction", False),
    "loss": ("valid/loss", False),
    "collisions": ("codebook/unique_ratio", True),
}
"""Metric, and whether higher is better."""


@dataclass(frozen=True, eq=False)
class RqVaeBatch:
    """What a step of the RQ-VAE needs on its device.

    Attributes:
        drawn: of `FeatureBatches.draw`.
        temperature: [] of the Gumbel softmax in this step; None where no level chooses softly.
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


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The arguments of `train` of these names, which decide what is trained besides its configs."""

    batch_size: int
    pretrain_steps: int
    kmeans_rows: int
    kmeans_rounds: int
    temperature: tuple[float, float]
    min_codebook_use: float
    train_on: str
    held_out: float
    select_by: str
    neighbours_together: int
    max_evaluated_items: int
    collisions: CollisionPolicy
    seed: int

    def __post_init__(self) -> None:
        name = "train_rqvae.train"
        require_at_least(
            1,
            name,
            batch_size=self.batch_size,
            kmeans_rows=self.kmeans_rows,
            neighbours_together=self.neighbours_together,
            max_evaluated_items=self.max_evaluated_items,
        )
        require_at_least(0, name, pretrain_steps=self.pretrain_steps, kmeans_rounds=self.kmeans_rounds)
        if not min(self.temperature) > 0:
            raise InputError(f"{name}.temperature expected two positive numbers, got {self.temperature}.")
        if not 0 < self.min_codebook_use <= 1:
            raise InputError(f"{name}.min_codebook_use expected a share in (0, 1], got {self.min_codebook_use}.")
        if not 0 <= self.held_out < 1:
            raise InputError(f"{name}.held_out expected a share in [0, 1), got {self.held_out}.")
        for field, choices in {"train_on": get_args(TrainOn), "select_by": get_args(SelectBy)}.items():
            if getattr(self, field) not in choices:
                raise InputError(f"{name}.{field} expected one of {', '.join(choices)}, got {getattr(self, field)!r}.")


class RqVaeTask:
    """What the training loop needs to know of an RQ-VAE.

    Args:
        model: the RQ-VAE, codebooks initialised.
        features: [N, D] of all items, in memory or memory-mapped.
        train_rows: which of them to train on, similar ones next to each other where neighbours shall meet.
        valid_rows: which of them to measure losses on; codebooks are measured on all.
        item_keys: of the rows of the features.
        settings: how to train and select.
        num_batches: over which the temperature anneals geometrically from its first to its last value.
    """

    def __init__(
        self,
        model: RqVae,
        features: RowMatrix,
        train_rows: np.ndarray,
        valid_rows: np.ndarray,
        *,
        item_keys: Sequence[str],
        settings: TokenizerSettings,
        num_batches: int,
    ) -> None:
        process = process_state()
        self._processes = run_processes()
        self.model: nn.Module = model
        self.selection_metric, self.higher_is_better = _SELECTION[settings.select_by]
        self._config = model.config
        self._features = features
        self._item_keys = item_keys
        self._batches = FeatureBatches(
            features,
            settings.batch_size,
            settings.seed,
            rows=train_rows,
            run_length=settings.neighbours_together,
            device=process.device,
            process_index=process.process_index,
            num_processes=process.num_processes,
        )
        self._valid_rows = _sample(valid_rows, settings.max_evaluated_items, settings.seed)
        self._measured_rows = _sample(np.arange(len(features)), settings.max_evaluated_items, settings.seed)
        self._settings = settings
        self._num_batches = num_batches

    def batch(self, step: int) -> RqVaeBatch:
        """Items and temperature of a step."""
        if not self._config.uses_temperature:
            return RqVaeBatch(self._batches.draw(step), None)
        first, last = self._settings.temperature
        temperature = first * (last / first) ** min(step / self._num_batches, 1.0)
        return RqVaeBatch(self._batches.draw(step), torch.tensor(temperature))

    def item_keys(self, step: int) -> list[str]:
        """The items of a step."""
        return [self._item_keys[row] for row in self._batches.row_numbers(step).tolist()]

    def loss(self, model: nn.Module, batch: RqVaeBatch) -> dict[str, Tensor]:
        """Loss of a batch and its parts."""
        temperature = 1.0 if batch.temperature is None else batch.temperature
        output = model(self._batches.pack(batch.drawn), temperature=temperature)
        parts = {"reconstruction": output.reconstruction_loss, "quantize": output.quantize_loss}
        if self._config.separation_weight > 0:
            parts["separation"] = output.separation_loss
        return {"loss": output.loss, **parts}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Losses over the validation items, codebook health over all items; both over a sample of very many.

        Every process calls it and gets the metrics that one process alone would get.

        Raises:
            InputError: if a level uses fewer of its codes than min_codebook_use.
        """
        losses, codes = self._measure(model, self._valid_rows)
        if not np.array_equal(self._valid_rows, self._measured_rows):
            codes = self._measure(model, self._measured_rows)[1]
        health = codebook_health(codes, self._config.codebook_sizes)
        check_collapse(health, self._settings.min_codebook_use)
        return losses | health.as_metrics()

    def _measure(self, model: nn.Module, rows: np.ndarray) -> tuple[dict[str, float], Tensor]:
        """Mean losses and codes of some rows, which the processes share; every one of them gets all."""
        blocks = (rows[start : start + _EVALUATION_ROWS] for start in range(0, len(rows), _EVALUATION_ROWS))
        losses, codes = torch.zeros(3, dtype=torch.float64), []
        for block_losses, block_codes in self._processes.map(partial(self._measure_block, model), blocks):
            losses += block_losses
            codes.append(block_codes)
        names = ("valid/loss", "valid/reconstruction", "valid/quantize")
        return dict(zip(names, (losses / len(rows)).tolist(), strict=True)), torch.cat(codes)

    def _measure_block(self, model: nn.Module, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Losses [3] float64, summed over the rows, and their codes [B, L]; both on the CPU."""
        values = torch.from_numpy(np.array(self._features[rows], dtype=np.float32))
        output = model(values.to(next(model.parameters()).device), temperature=self._settings.temperature[1])
        means = torch.stack([output.loss, output.reconstruction_loss, output.quantize_loss])
        return means.double().cpu() * len(rows), output.codes.cpu()


def initialize_(rqvae: RqVae, features: RowMatrix, train_rows: np.ndarray, settings: TokenizerSettings) -> None:
    """Codebooks by k-means, on a roughly trained encoder where there is one; a resumed run overwrites both."""
    if rqvae.config.encoder == "identity":
        seen = features if len(train_rows) == len(features) else ChosenRows(features, train_rows)
        device = process_state().device
        rqvae.set_codebooks_(residual_kmeans(seen, rqvae.config.codebook_sizes, seed=settings.seed, device=device))
        return
    chosen = _sample(train_rows, settings.kmeans_rows, settings.seed)
    first_rows = torch.from_numpy(np.asarray(features[chosen], dtype=np.float32))
    if rqvae.config.encoder == "skip":
        rqvae.set_principal_components_(first_rows)
    batch_size = settings.batch_size * process_state().num_processes
    rqvae.fit_autoencoder_(first_rows, num_steps=settings.pretrain_steps, batch_size=batch_size, seed=settings.seed)
    rqvae.initialize_codebooks_(first_rows, num_rounds=settings.kmeans_rounds, seed=settings.seed)


def by_codes(rqvae: RqVae, features: RowMatrix, rows: np.ndarray) -> np.ndarray:
    """The rows in the order of their first codes, so that similar ones lie next to each other; the main process's."""
    codes = assign_codes(rqvae, ChosenRows(features, rows)).cpu().numpy()
    (ordered,) = broadcast_object_list([rows[np.lexsort(codes.T[::-1])]])
    return ordered


def _sample(rows: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
    """Up to num_rows of the rows, ascending; the same for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:num_rows])
