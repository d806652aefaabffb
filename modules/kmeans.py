"""K-means on rows in memory: bounded in time and memory, and safe on awkward data."""

import math

import torch
from torch import Tensor

from data.schemas import InputError
from modules.breathing import breathe
from modules.lloyd import lloyd

_JITTER = 1e-3
"""Distance of the spare centroids from the rows they copy, relative to the size of the data's values."""

_START_ROWS, _LEAST_START_ROWS = 128, 16_384
"""Rows per code, and at least, on which the start is looked for; more of them cost much and move it little."""

_NAMED_ROWS = 5
"""Broken rows that an error names."""


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    num_iterations: int = 25,
    num_rounds: int = 0,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Centroids by Lloyd's algorithm from a greedy k-means++ start (Arthur and Vassilvitskii 2007, section 7).

    Stops when no assignment changes, at the latest after num_iterations. With fewer distinct rows than codes
    the spare centroids lie close around existing rows, so that all are distinct. An empty cluster is moved to
    the row farthest from its own centroid. The same data and seed give the same centroids.

    Args:
        x: [N, D] finite rows, N at least 1.
        num_codes: K.
        num_iterations: limit of Lloyd's steps.
        num_rounds: of `breathing.breathe`, which lower the error by some percent and take several times as long
            as the rest; about 15 are enough.
        tolerance: stop, too, where a step of Lloyd's lowers the error by no more than this share.
        seed: of the start.

    Returns:
        [K, D] float32 on the device of x.

    Raises:
        InputError: if x has no rows or holds NaN or infinite values.
    """
    _check_rows(x)
    x = x.float()
    generator = torch.Generator().manual_seed(seed)
    some = _some_rows(x, max(num_codes * _START_ROWS, _LEAST_START_ROWS), generator)
    centroids = _plus_plus_start(some, num_codes, generator)
    if num_rounds > 0:
        clusters = lloyd(some, centroids, num_iterations=num_iterations, tolerance=tolerance)
        centroids = breathe(some, clusters, num_rounds=num_rounds, generator=generator).centroids
    return lloyd(x, centroids, num_iterations=num_iterations, tolerance=tolerance).centroids


def _check_rows(x: Tensor) -> None:
    finite = x.isfinite().all(dim=1) if x.ndim == 2 else x.isfinite()
    if x.ndim == 2 and len(x) > 0 and bool(finite.all()):
        return
    rows = (~finite).nonzero()[:, 0].tolist() if x.ndim == 2 else []
    named = ", ".join(map(str, rows[:_NAMED_ROWS])) + (", ..." if len(rows) > _NAMED_ROWS else "")
    raise InputError(
        f"kmeans expected a non-empty [N, D] matrix of finite values, got shape {list(x.shape)} with "
        f"{len(rows)} non-finite rows{': ' * bool(rows)}{named}. Look for broken rows in the item features."
    )


def _some_rows(x: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    if len(x) <= num_rows:
        return x
    return x[torch.randperm(len(x), generator=generator)[:num_rows].sort().values.to(x.device)]


def _plus_plus_start(x: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one by one with probability proportional to the squared distance to those drawn before.

    Of a few rows drawn at a time, the one that leaves the least error is taken. Nothing waits for the device before
    the last row is drawn.
    """
    norms = torch.linalg.vector_norm(x, dim=1).square()
    distance = torch.full((len(x),), torch.inf, device=x.device)
    centroids = torch.empty(num_codes, x.shape[1], device=x.device)
    draws = torch.rand(num_codes, 2 + int(math.log(num_codes)), generator=generator, dtype=torch.float64)
    totals = torch.ones(num_codes, dtype=torch.float64, device=x.device)
    row = (draws[0, :1] * len(x)).long().to(x.device)
    draws = draws.to(x.device)
    for code in range(num_codes):
        if code > 0:
            cumulative = distance.double().cumsum(dim=0)
            totals[code] = cumulative[-1]
            drawn = torch.searchsorted(cumulative, draws[code] * cumulative[-1], right=True).clamp(max=len(x) - 1)
            row = _best_of(x, norms, distance, drawn)
        centroids[code] = x[row][0]
        distance = torch.minimum(distance, _exact_distance(x, x[row]))
    # From where every distinct row is a centroid already, all distances are zero.
    num_drawn = int((totals > 0).sum())
    return _fill_around_rows(x, centroids, num_drawn, generator) if num_drawn < num_codes else centroids


def _best_of(x: Tensor, norms: Tensor, distance: Tensor, drawn: Tensor) -> Tensor:
    """[1]: the drawn row that leaves the least sum of distances."""
    found = torch.addmm(norms, x[drawn], x.T, alpha=-2) + norms[drawn, None]
    return drawn[torch.minimum(found.clamp_(min=0), distance).sum(dim=1).argmin()][None]


def _exact_distance(x: Tensor, row: Tensor) -> Tensor:
    """Squared distance of [N, D] rows to [1, D], 0 for equal rows: no difference of large products."""
    return torch.cdist(row, x, compute_mode="donot_use_mm_for_euclid_dist")[0].square_()


def _fill_around_rows(x: Tensor, centroids: Tensor, num_filled: int, generator: torch.Generator) -> Tensor:
    num_spare = len(centroids) - num_filled
    rows = torch.randint(len(x), (num_spare,), generator=generator).to(x.device)
    noise = torch.randn(num_spare, x.shape[1], generator=generator).to(x.device)
    size = x.abs().mean()
    centroids[num_filled:] = x[rows] + _JITTER * torch.where(size > 0, size, 1.0) * noise
    return centroids
