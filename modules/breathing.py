"""Better local optima of k-means: centroids are added where the error is, the least useful ones are taken away."""

import torch
from torch import Tensor

from modules.lloyd import Clusters, lloyd
from ops import codebook_stats

_FIRST_SHARE = 4
"""The first round adds one centroid for so many."""

_GROWN_STEPS, _SHRUNK_STEPS = 4, 6
"""Of Lloyd's algorithm within a round: enough to tell a better round from a worse one."""

_STEP_TOLERANCE = 1e-3
_ROUND_TOLERANCE = 5e-4
"""Shares of the inertia: a step that gains less ends its round, a round that gains less halves the next one."""

_SPLIT = 0.1
"""Distance of an added centroid from the one it splits, in units of the rows' mean distance."""

_MAX_DISTANCES = 1 << 22
"""Distances held at once."""


def breathe(x: Tensor, clusters: Clusters, *, num_rounds: int, generator: torch.Generator) -> Clusters:
    """Rounds of the breathing k-means algorithm (Fritzke 2020, arXiv 2006.15666), which get out of local optima.

    A round splits the centroids of the largest error, runs a few steps of Lloyd's algorithm, takes as many centroids
    away as it added, those whose rows lose least by it, and runs a few steps more. What is worse than before is
    dropped. Rounds become smaller as they gain little, and end when one adds nothing.

    Args:
        x: [N, D] rows.
        clusters: of these rows.
        num_rounds: at most.
        generator: of the directions in which centroids are split.
    """
    num_codes = len(clusters.centroids)
    num_added, inertia = max(1, num_codes // _FIRST_SHARE), clusters.inertia()
    for _ in range(num_rounds):
        if num_added == 0 or inertia == 0:
            break
        grown = _steps(x, _grow(clusters, num_added, generator), _GROWN_STEPS)
        shrunk = _steps(x, _shrink(x, grown.centroids, num_codes), _SHRUNK_STEPS)
        gain = (inertia - shrunk.inertia()) / inertia
        if gain > 0:
            clusters, inertia = shrunk, shrunk.inertia()
        if gain <= _ROUND_TOLERANCE:
            num_added //= 2
    return clusters


def _steps(x: Tensor, centroids: Tensor, num_steps: int) -> Clusters:
    return lloyd(x, centroids, num_iterations=num_steps, tolerance=_STEP_TOLERANCE)


def _grow(clusters: Clusters, num_added: int, generator: torch.Generator) -> Tensor:
    """Centroids [K + num_added, D]: those of the largest error have a twin close by."""
    centroids, width = clusters.centroids, clusters.centroids.shape[1]
    split = centroids[_sum_by_code(clusters.distance, clusters.codes, len(centroids)).topk(num_added).indices]
    noise = torch.randn(split.shape, generator=generator).to(split.device)
    return torch.cat([centroids, split + _SPLIT * (clusters.distance.mean() / width).sqrt() * noise])


def _shrink(x: Tensor, centroids: Tensor, num_codes: int) -> Tensor:
    """The num_codes centroids that are left when those go whose rows lose least by it.

    The nearest neighbour of one that goes has to stay, since it is to take the rows.
    """
    codes, _, loss = _two_nearest(x, centroids)
    neighbours = _two_nearest(centroids, centroids)[1].tolist()
    gone: set[int] = set()
    staying: set[int] = set()
    for code in _sum_by_code(loss, codes, len(centroids)).argsort().tolist():
        if len(gone) == len(centroids) - num_codes:
            break
        if code not in staying:
            gone.add(code)
            staying.add(neighbours[code])
    kept = [code for code in range(len(centroids)) if code not in gone]
    return centroids[torch.tensor(kept[:num_codes], device=centroids.device)]


def _two_nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest and the next centroid of every row, [N] int64, and how much farther the next one is, squared."""
    norms = centroids.square().sum(dim=1)
    found = []
    for block in x.split(max(1, _MAX_DISTANCES // len(centroids))):
        distance = torch.addmm(norms, block, centroids.T, alpha=-2)
        first = distance.min(dim=1)
        second = distance.scatter_(1, first.indices[:, None], torch.inf).min(dim=1)
        found.append((first.indices, second.indices, second.values - first.values))
    codes, next_codes, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, next_codes, loss


def _sum_by_code(values: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    return codebook_stats(values[:, None], codes, num_codes)[1][:, 0]
