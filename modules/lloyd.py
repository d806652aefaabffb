"""Lloyd's algorithm on rows in memory: rows go to the nearest centroid, centroids to the mean of their rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from ops import codebook_stats, residual_quantize


class Clusters(NamedTuple):
    """Centroids [K, D], and every row's nearest one [N] int64 and squared distance to it [N]."""

    centroids: Tensor
    codes: Tensor
    distance: Tensor

    def inertia(self) -> float:
        """Sum of the squared distances; waits for the device."""
        return float(self.distance.sum(dtype=torch.float64))


def lloyd(x: Tensor, centroids: Tensor, *, num_iterations: int, tolerance: float = 0.0) -> Clusters:
    """Move centroids to the means of their rows until no row changes its cluster.

    A centroid without rows is moved to the row farthest from its own centroid.

    Args:
        x: [N, D] finite rows, fp32 or fp64.
        centroids: [K, D] to begin with.
        num_iterations: limit of moves.
        tolerance: stop, too, where a move lowers the inertia by no more than this share.
    """
    clusters = nearest(x, centroids)
    inertia = clusters.inertia()
    for _ in range(num_iterations):
        previous, previous_inertia = clusters, inertia
        clusters = nearest(x, _means(x, previous))
        inertia = clusters.inertia()
        settled = previous_inertia - inertia <= tolerance * previous_inertia
        if settled or torch.equal(clusters.codes, previous.codes):
            break
    return clusters


def nearest(x: Tensor, centroids: Tensor) -> Clusters:
    """The clusters of rows [N, D] about given centroids [K, D]."""
    codes, offset = residual_quantize(x, [centroids])
    return Clusters(centroids, codes[:, 0], offset.square_().sum(dim=1))


def move_to_means(counts: Tensor, sums: Tensor, centroids: Tensor, far_rows: Tensor, far_distance: Tensor) -> Tensor:
    """Centroids at the means of their rows; those without rows go to the far rows in turn.

    Args:
        counts: [K] rows of each centroid.
        sums: [K, D] of those rows.
        centroids: [K, D] as they were; one without rows stays where no far row is left.
        far_rows: [M, D] rows, the farthest from its centroid first.
        far_distance: [M]; a row at distance 0 would found no cluster of its own and is passed over.
    """
    means = (sums / counts.clamp(min=1)[:, None]).to(centroids.dtype)
    moved = torch.where(counts[:, None] > 0, means, centroids)
    empty = (counts == 0).nonzero()[:, 0]
    far_rows = far_rows[far_distance > 0][: len(empty)]
    moved[empty[: len(far_rows)]] = far_rows.to(centroids.dtype)
    return moved


def _means(x: Tensor, clusters: Clusters) -> Tensor:
    counts, sums = codebook_stats(x, clusters.codes, len(clusters.centroids))
    num_empty = int((counts == 0).sum())
    far = clusters.distance.argsort(descending=True, stable=True)[:num_empty] if num_empty else counts[:0]
    return move_to_means(counts, sums, clusters.centroids, x[far], clusters.distance[far])
