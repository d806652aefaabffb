"""K-means over more rows than memory holds: a start on a sample, mini-batches, then whole passes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import InputError
from modules.feature_rows import FeatureMatrix, RowBlocks
from modules.kmeans import kmeans
from modules.lloyd import move_to_means, nearest
from ops import codebook_stats

_SAMPLE_ROWS, _LEAST_SAMPLE_ROWS = 256, 65_536
"""Rows per code, and at least, in the sample: such centroids are about 1 / 256 worse than those of all rows."""


@dataclass(frozen=True, kw_only=True)
class KmeansEffort:
    """What k-means may cost.

    Attributes:
        memory_rows: a matrix of no more rows is read into memory, and nothing is streamed; no sample is larger.
        num_iterations: limit of Lloyd's steps on rows in memory.
        num_rounds: of `breathing.breathe` on rows in memory.
        batch_rows: rows read at once where rows are streamed.
        epochs: passes in mini-batches.
        max_passes: limit of Lloyd's steps over streamed rows.
        tolerance: share of the inertia that a step of Lloyd's has to gain to be followed by another, on rows in memory.
        pass_tolerance: the same on streamed rows.
    """

    memory_rows: int = 200_000
    num_iterations: int = 200
    num_rounds: int = 15
    batch_rows: int = 16_384
    epochs: int = 1
    max_passes: int = 10
    tolerance: float = 1e-5
    pass_tolerance: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in {"memory_rows": 1, "batch_rows": 1, "num_iterations": 0, "num_rounds": 0}.items():
            self._require_at_least(least, name)
        for name in ("epochs", "max_passes", "tolerance", "pass_tolerance"):
            self._require_at_least(0, name)

    def _require_at_least(self, least: int, name: str) -> None:
        if not getattr(self, name) >= least:
            raise InputError(f"KmeansEffort.{name} expected at least {least}, got {getattr(self, name)}.")

    def sample_rows(self, num_rows: int, num_codes: int) -> int:
        """How many of num_rows the sample for num_codes holds."""
        wanted = max(_SAMPLE_ROWS * num_codes, _LEAST_SAMPLE_ROWS)
        return num_rows if num_rows <= self.memory_rows else min(self.memory_rows, wanted)


@torch.no_grad()
def minibatch_kmeans(
    features: FeatureMatrix,
    num_codes: int,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    effort: KmeansEffort | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    item_keys: Sequence[str] | None = None,
) -> Tensor:
    """Centroids of a matrix of any length, in memory that does not grow with it.

    Args:
        features: [N, D_in], N at least 1; a memory map is read in slices and stays where it is.
        num_codes: K.
        transform: applied to blocks of rows, [B, D_in] fp32 -> [B, D], before they are clustered.
        effort: by default KmeansEffort().
        seed: of the sample, the start and the order of mini-batches.
        device: where to compute.
        item_keys: of the rows, to be named in errors.

    Returns:
        [K, D] float32 on the device.

    Raises:
        InputError: if there are no rows, or a row holds NaN or infinity (it is named).
    """
    effort = effort or KmeansEffort()
    rows = RowBlocks(features, block_rows=effort.batch_rows, device=device, transform=transform, item_keys=item_keys)
    sample = rows.sample(effort.sample_rows(rows.num_rows, num_codes), seed)
    return fit_centroids(rows, sample, num_codes, effort=effort, seed=seed)


@torch.no_grad()
def fit_centroids(rows: RowBlocks, sample: Tensor, num_codes: int, *, effort: KmeansEffort, seed: int) -> Tensor:
    """Centroids [K, D] of rows of which a sample [S, D] lies in memory; where that is all of them, of the sample."""
    centroids = kmeans(
        sample,
        num_codes,
        num_iterations=effort.num_iterations,
        num_rounds=effort.num_rounds,
        tolerance=effort.tolerance,
        seed=seed,
    )
    if len(sample) == rows.num_rows:
        return centroids
    counts = codebook_stats(sample, nearest(sample, centroids).codes, num_codes)[0]
    for epoch in range(effort.epochs):
        centroids, counts = _minibatch_epoch(rows.shuffled([seed, epoch]), centroids, counts)
    return _streamed_lloyd(rows, centroids, effort)


def _minibatch_epoch(batches: Iterable[Tensor], centroids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Every centroid moves towards its rows of a batch at a rate of one over the rows it has had (Sculley 2010)."""
    for batch in batches:
        new_counts, sums = codebook_stats(batch, nearest(batch, centroids).codes, len(centroids))
        counts = counts + new_counts
        centroids = centroids + (sums - new_counts[:, None] * centroids) / counts.clamp(min=1)[:, None]
    return centroids, counts


def _streamed_lloyd(rows: RowBlocks, centroids: Tensor, effort: KmeansEffort) -> Tensor:
    previous = None
    for _ in range(effort.max_passes):
        inertia, centroids = _pass(rows, centroids)
        if previous is not None and previous - inertia <= effort.pass_tolerance * previous:
            break
        previous = inertia
    return centroids


def _pass(rows: RowBlocks, centroids: Tensor) -> tuple[float, Tensor]:
    """One step of Lloyd's over all rows: their inertia, and where it moves the centroids."""
    num_codes, width = centroids.shape
    counts = torch.zeros(num_codes, dtype=torch.int64, device=centroids.device)
    sums = torch.zeros(num_codes, width, dtype=torch.float64, device=centroids.device)
    inertia = torch.zeros((), dtype=torch.float64, device=centroids.device)
    far_rows, far_distance = centroids[:0], centroids[:0, 0]
    for block in rows:
        clusters = nearest(block, centroids)
        block_counts, block_sums = codebook_stats(block, clusters.codes, num_codes)
        counts, sums = counts + block_counts, sums + block_sums
        inertia += clusters.distance.sum(dtype=torch.float64)
        far_rows, far_distance = _farthest(far_rows, far_distance, block, clusters.distance, num_codes)
    return float(inertia), move_to_means(counts, sums, centroids, far_rows, far_distance)


def _farthest(
    far_rows: Tensor, far_distance: Tensor, block: Tensor, distance: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The farthest num_rows of the far rows so far and of a block, the farthest first."""
    of_block = distance.topk(min(num_rows, len(distance)))
    rows, distance = torch.cat([far_rows, block[of_block.indices]]), torch.cat([far_distance, of_block.values])
    farthest = distance.topk(min(num_rows, len(distance)))
    return rows[farthest.indices], farthest.values
