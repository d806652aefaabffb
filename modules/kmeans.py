"""K-means for the first codebooks: bounded in time and memory, and safe on awkward data."""

import torch
from torch import Tensor

from data.schemas import InputError
from ops import codebook_stats, residual_quantize

_JITTER = 1e-3
"""Distance of the spare centroids from the rows they copy, relative to the size of the data's values."""


@torch.no_grad()
def kmeans(x: Tensor, num_codes: int, *, num_iterations: int = 25, seed: int = 0) -> Tensor:
    """Centroids by Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007).

    Stops when no assignment changes, at the latest after num_iterations. With fewer distinct rows than codes
    the spare centroids lie close around existing rows, so that all are distinct. An empty cluster is moved to
    the row farthest from its own centroid. The same data and seed give the same centroids.

    Args:
        x: [N, D] finite rows, N at least 1.
        num_codes: K.
        num_iterations: limit of Lloyd's steps.
        seed: of the start.

    Returns:
        [K, D] float32 on the device of x.

    Raises:
        InputError: if x has no rows or holds NaN or infinite values.
    """
    if x.ndim != 2 or len(x) == 0 or not bool(x.isfinite().all()):
        raise InputError(
            f"kmeans expected a non-empty [N, D] matrix of finite values, got shape {list(x.shape)} with "
            f"{int((~x.isfinite()).sum())} non-finite values. Look for broken rows in the item features."
        )
    x = x.float()
    generator = torch.Generator().manual_seed(seed)
    centroids = _plus_plus_start(x, num_codes, generator)
    previous = None
    for _ in range(num_iterations):
        codes, offset = residual_quantize(x, [centroids])
        if previous is not None and torch.equal(codes, previous):
            break
        previous = codes
        centroids = _move_to_means(x, codes[:, 0], offset.square().sum(dim=1), centroids)
    return centroids


def _plus_plus_start(x: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one by one with probability proportional to the squared distance to those drawn before.

    Nothing waits for the device before the last row is drawn.
    """
    distance = torch.full((len(x),), torch.inf, device=x.device)
    centroids = torch.empty(num_codes, x.shape[1], device=x.device)
    draws = torch.rand(num_codes, generator=generator, dtype=torch.float64)
    totals = torch.ones(num_codes, dtype=torch.float64, device=x.device)
    row = (draws[:1] * len(x)).long().to(x.device)
    draws = draws.to(x.device)
    for code in range(num_codes):
        if code > 0:
            cumulative = distance.double().cumsum(dim=0)
            totals[code] = cumulative[-1]
            drawn = draws[code : code + 1] * cumulative[-1:]
            row = torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(x) - 1)
        centroids[code] = x[row][0]
        distance = torch.minimum(distance, (x - x[row]).square().sum(dim=1))
    # From where every distinct row is a centroid already, all distances are zero.
    num_drawn = int((totals > 0).sum())
    return _fill_around_rows(x, centroids, num_drawn, generator) if num_drawn < num_codes else centroids


def _fill_around_rows(x: Tensor, centroids: Tensor, num_filled: int, generator: torch.Generator) -> Tensor:
    num_spare = len(centroids) - num_filled
    rows = torch.randint(len(x), (num_spare,), generator=generator).to(x.device)
    noise = torch.randn(num_spare, x.shape[1], generator=generator).to(x.device)
    size = x.abs().mean()
    centroids[num_filled:] = x[rows] + _JITTER * torch.where(size > 0, size, 1.0) * noise
    return centroids


def _move_to_means(x: Tensor, codes: Tensor, distance: Tensor, centroids: Tensor) -> Tensor:
    counts, sums = codebook_stats(x, codes, len(centroids))
    moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    empty = (counts == 0).nonzero()[:, 0]
    # Only rows that lie away from their centroid can found a cluster of their own.
    farthest = distance.argsort(descending=True, stable=True)[: len(empty)]
    farthest = farthest[distance[farthest] > 0]
    moved[empty[: len(farthest)]] = x[farthest]
    return moved
